#!/usr/bin/env bash
# From a series table of head CT to a tested head for six haemorrhage labels: split → extract → train-head → eval.
#
#   scripts/ich_pipeline.sh SERIES_CSV MODEL OUT [KEY=VALUE...]
#
# SERIES_CSV  rel_dir, patient_id (optional), study_uid, series_uid, nifti_path and the label_ columns; see the README
# MODEL       run folder or weight file of a backbone
# OUT         splits/ features/ head/ eval/ test_metrics.json test_probs.npy pipeline_summary.json
# KEY=VALUE   split.ratios="0.6 0.2 0.2" and split.seed=1 for the split; extract.KEY=VALUE for extract, with
#             extract.pool=meanmax and extract.on_error=skip for its options; head.config=ich_logistic for another
#             recipe of the head than ich; device=cuda:1, gpus=4 and cache=DIR; overwrite=true to replace what other
#             settings left in OUT; anything else is a key of train-head
#
# Vectors are computed once: a second run takes them from the cache. Exit codes are those of medssl; 4 means that some
# series could not be read and are counted in pipeline_summary.json.
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,17p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
series="$1" model="$2" out="$3"
shift 3

here="$(cd "$(dirname "$0")" && pwd)"
command -v medssl >/dev/null || export PATH="$here/../.venv/bin:$PATH"
if ! command -v medssl >/dev/null; then
  printf 'error: medssl is not installed.\n  fix:   run scripts/demo once, or pip install -e .\n' >&2
  exit 6
fi
python="$(dirname "$(command -v medssl)")/python"
labels="label_any,label_epidural,label_intraparenchymal,label_intraventricular,label_subarachnoid,label_subdural"

# lists that may be empty are written ${list[@]+"${list[@]}"} below: to bash before 4.4 they are unset
ratios=(0.7 0.15 0.15) seed=42 pool=mean on_error=stop recipe=ich again=() device=() of_extract=() of_head=()
for pair in "$@"; do
  case "$pair" in
    split.ratios=*) read -ra ratios <<<"${pair#*=}" ;;
    split.seed=*) seed="${pair#*=}" ;;
    extract.pool=*) pool="${pair#*=}" ;;
    extract.on_error=*) on_error="${pair#*=}" ;;
    head.config=*) recipe="${pair#*=}" ;;
    device=*) device=(--device "${pair#*=}") ;;
    gpus=*) of_extract+=(--gpus "${pair#*=}") ;;
    cache=*) of_extract+=(--cache "${pair#*=}") ;;
    overwrite=true) again=(--overwrite) ;;
    split.*) printf 'error: %s is no key of the split: split.ratios and split.seed are.\n' "$pair" >&2 && exit 2 ;;
    extract.*=*) of_extract+=("${pair#extract.}") ;;
    *=*) of_head+=("$pair") ;;
    *) printf 'error: %s is no KEY=VALUE.\n' "$pair" >&2 && exit 2 ;;
  esac
done
if [ ${#ratios[@]} -ne 3 ]; then
  printf 'error: split.ratios takes three numbers, e.g. split.ratios="0.7 0.15 0.15".\n' >&2
  exit 2
fi

partial=0
run() { # some series failed and are listed (4): the rest is worth going on with
  printf '> medssl %s\n' "$*" >&2
  local code=0
  medssl "$@" || code=$?
  if [ "$code" -eq 4 ]; then partial=4; elif [ "$code" -ne 0 ]; then exit "$code"; fi
}

if [ -d "$out/features" ] && [ ! -L "$out/features" ]; then
  printf 'error: A folder is in the way.\n  where: %s\n  fix:   move it away, or choose another OUT.\n' "$out/features" >&2
  exit 2
fi

"$python" "$here/pipeline_summary.py" check "$series" "head.config=$recipe" ${of_head[@]+"${of_head[@]}"}
run split "$series" --out "$out/splits" --ratios "${ratios[@]}" --seed "$seed" --stratify "$labels" ${again[@]+"${again[@]}"}
run extract "$series" --config ich --model "$model" --out "$out/extract" --splits "$out/splits" --labels "$series" \
  --target "$labels" --pool "$pool" --on-error "$on_error" ${again[@]+"${again[@]}"} ${device[@]+"${device[@]}"} \
  ${of_extract[@]+"${of_extract[@]}"}
ln -sfn extract/features "$out/features"
run train-head "$out/features" --config "$recipe" --task multilabel --out "$out/head" ${again[@]+"${again[@]}"} \
  ${device[@]+"${device[@]}"} ${of_head[@]+"${of_head[@]}"}
run eval --model "$out/head" --data "$out/features" --split test --out "$out/eval" ${again[@]+"${again[@]}"} \
  ${device[@]+"${device[@]}"}
"$python" "$here/pipeline_summary.py" write "$out" "$@"
exit "$partial"
