#!/usr/bin/env bash
# From nothing to a fully fine-tuned model and its figures: see README.md. Run again, it skips what is done; interrupted,
# it continues. QUICKSTART_PROCESSES=N: how many processes train (default 2).
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${QUICKSTART_PROCESSES:-2}
data=artifacts/quickstart
model=artifacts/models/SmolLM2-135M-Instruct
run=runs/laptop
trap 'code=$?; if [ $code -ne 0 ]; then echo "stopped with exit code $code; run the same command again to continue" >&2; fi' EXIT

echo "== 1/6 virtual environment"
source scripts/setup.sh requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would set it and say so at length; train.py shares the cores out

echo "== 2/6 base model"
python scripts/fetch_base_model.py

echo "== 3/6 bank reports: files as banks file them, and examples made from the files"
python scripts/make_reports.py --profile short --examples 2300 --splits 0.88 0.06 0.06 --seed 0 --out "$data"
[ -e artifacts/replay/topics.jsonl ] || python scripts/make_replay.py --source topics --out artifacts/replay/topics.jsonl

evaluate() { # MODEL RESULT [options]
  torchrun --standalone --nproc_per_node="$processes" scripts/evaluate.py "$1" --json "$2" --data "$data/test.jsonl" \
    --train "$data/train.jsonl" --general "${@:3}"
}
mkdir -p "$run/eval"
if [ ! -e "$run/eval/before.json" ]; then
  echo "== 4/6 the base model on banks it will not be trained on"
  evaluate "$model" "$run/eval/before.json" --show 0
fi

echo "== 5/6 full fine-tuning on $processes processes"
torchrun --standalone --nproc_per_node="$processes" train.py configs/laptop.py

echo "== 6/6 the tuned model on the same banks"
evaluate "$run/export" "$run/eval/after.json" --before "$run/eval/before.json"
torchrun --standalone --nproc_per_node="$processes" scripts/evaluate_forgetting.py "$model" "$run/export" \
  --json "$run/eval/forgetting.json"
cat <<END

curves          tensorboard --logdir $run/tensorboard     (after: source .venv/bin/activate)
exported model  $run/export                (a Hugging Face directory)
figures         $run/eval/before.json, $run/eval/after.json, $run/eval/forgetting.json
END
