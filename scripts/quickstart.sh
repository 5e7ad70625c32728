#!/usr/bin/env bash
# From nothing to a fully fine-tuned model and its figures: see README.md. Run again, it skips what is done; interrupted,
# it continues. QUICKSTART_PROCESSES=N: how many processes train (default 2). QUICKSTART_SEED=N: other banks, another
# order of the examples and a run of its own (default 0).
set -euo pipefail
cd "$(dirname "$0")/.."
processes=${QUICKSTART_PROCESSES:-2}
seed=${QUICKSTART_SEED:-0}
name=quickstart
[ "$seed" = 0 ] || name=quickstart-$seed
data=artifacts/$name
model=artifacts/models/SmolLM2-135M-Instruct
run=runs/$name
trap 'code=$?; if [ $code -ne 0 ]; then echo "stopped with exit code $code; run the same command again to continue" >&2; fi' EXIT

echo "== 1/6 virtual environment"
source scripts/setup.sh requirements-xbrl.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would set it and say so at length; train.py shares the cores out

echo "== 2/6 base model"
python scripts/fetch_base_model.py

echo "== 3/6 bank reports: files as banks file them, and examples made from the files"
python xbrl/scripts/make_reports.py --profile quickstart --seed "$seed" --out "$data"
[ -e artifacts/replay/topics.jsonl ] || python scripts/data.py replay --source topics --out artifacts/replay/topics.jsonl

evaluate() { # MODEL RESULT [options]
  torchrun --standalone --nproc_per_node="$processes" scripts/evaluate.py "$1" --json "$2" --task xbrl.task \
    --data "$data/test.jsonl" --train "$data/train.jsonl" --validation "$data/validation.jsonl" --show 0 "${@:3}" > /dev/null
}
mkdir -p "$run/eval"
if [ ! -e "$run/eval/before.json" ]; then
  echo "== 4/6 the base model, with four solved examples before each question, on 20 of the test's reports"
  evaluate "$model" "$run/eval/before.json" --shots 4 --limit 20 --max-new-tokens 60
fi

echo "== 5/6 full fine-tuning on $processes processes"
torchrun --standalone --nproc_per_node="$processes" train.py configs/quickstart.py \
  data.train="$data/train.jsonl" data.validation="$data/validation.jsonl" run.name="$name" run.seed="$seed"

echo "== 6/6 the tuned model on 112 reports of other banks, whose notes use other words"
evaluate "$run/export" "$run/eval/after.json"
torchrun --standalone --nproc_per_node="$processes" scripts/measure.py forgetting "$model" "$run/export" \
  --max-bytes 8000 --json "$run/eval/forgetting.json" > /dev/null
python -m xbrl.answers.screen "$run" "$data" "$model"
