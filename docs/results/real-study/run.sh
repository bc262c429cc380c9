#!/usr/bin/env bash
# The real study in the folder real/ below here; killed or stopped, the same command goes on.
#
#   bash run.sh DATA LM_WHEEL VISION_WHEEL [flags of `ldistill study`, such as --variant labels]
#
# ITEMS (40) of each task, LIMIT (0: all) samples of each source, ALIGN flags of the projector stage.
set -euo pipefail
data=$1 lm=$2 vision=$3
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p real
cp "$here"/{recipe.yaml,measure.py} real/
[ -e real/pair/student/config.json ] || python "$here/make_pair.py" "$lm" "$vision" real/pair
if [ ! -e real/measured/texts.json ]; then # written last
  python "$here/make_data.py" "$data" real/pair/student real --items "${ITEMS:-40}" --limit "${LIMIT:-0}"
fi
if [ ! -e real/aligned/student/config.json ]; then
  # shellcheck disable=SC2086 - several flags
  python -m ldistill.train --recipe "$here/align.yaml" --output_dir real/aligned \
    --resume_from_checkpoint auto ${ALIGN:-}
fi
ldistill study "$here/study.yaml" --out real/study "${@:4}"
