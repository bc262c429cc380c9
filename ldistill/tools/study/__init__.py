"""The paper's study: every variant of its Table 3 from one start, trained, evaluated, reported."""
