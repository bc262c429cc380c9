#!/usr/bin/env bash
# Stands in for `python -m ldistill.train` where the scripts of slurm/ are tested: called like it, it
# keeps to the same contract (exit codes, stop file, exit file, checkpoint folders), without a model.
# FAULT: crash (rank 1 is killed), progress (every start ends with a checkpoint and a crash),
# mistake (rank 1 has something to tell).
while (($#)); do
  [[ $1 == --output_dir ]] && out=$2
  [[ $1 == --max_steps ]] && steps=$2
  shift
done
case ${FAULT:-} in
  crash) ((RANK == 1)) && kill -9 $$ ;;
  mistake) ((RANK == 1)) && { echo 2 > "$LDISTILL_EXIT_FILE"; exit 2; } ;;
  progress)
    ((RANK == 1)) && exec sleep 2   # ended before, or with rank 0
    mkdir "$out/checkpoint-$(($(find "$out" -name 'checkpoint-*' | wc -l) + 1))"
    [[ -e $out/checkpoint-4 ]] && exit 0 || exit 1 ;;
esac
step=$(cat "$out/step" 2>/dev/null || echo 0)
((RANK == 0)) && echo "from $step: $WORLD_SIZE ranks, $LOCAL_WORLD_SIZE here, $MASTER_ADDR:$MASTER_PORT"
while ((step++ < ${steps:-6})); do
  sleep 0.5
  ((RANK == 0)) && echo "$step" > "$out/step.part" && mv "$out/step.part" "$out/step"
  if [[ -e $LDISTILL_STOP_FILE ]]; then
    ((RANK == 0)) && echo 85 > "$LDISTILL_EXIT_FILE" && sleep 0.5   # killed, when rank 1 has left
    until [[ -s $LDISTILL_EXIT_FILE ]]; do sleep 0.1; done   # with no rank before the code is written
    exit 85
  fi
done
exit 0
