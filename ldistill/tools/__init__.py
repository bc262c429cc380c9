"""What a user runs beside training: bench, plan, torture, study, doctor, look."""
