#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any size and deletes it at the end, from the repository's root:
#
#   scripts/tpu_vm.sh --project=P --zone=Z -- \
#     --config=configs/lits.py --config.data.root=gs://B/lits --config.data.store=gs://B/store \
#     --workdir=gs://B/runs/lits --config.model.sam_weights=gs://B/sam_vit_b.safetensors \
#     --config.train.batch_labelled=16 --config.train.batch_unlabelled=16 \
#     --config.log.validate_every_steps=375 --config.checkpoint.every_steps=125
#
# What follows -- is the program's. Options:
#   --name=sammix  --accelerator=v5litepod-16  --runtime=v2-alpha-tpuv5-lite
#   --on-demand     not a Spot slice
#   --restarts=100  how often a run that was cut off is taken up again
#   --dry-run       print each command and run none
#
# The commit that is checked out is copied to the slice; with changes to the code or the configs
# beside it nothing is started. Ctrl-C lets the run save,
# then deletes the slice. With JAX_COMPILATION_CACHE_DIR=gs://B/compiled in the environment another
# slice takes up what the one before it has compiled.
set -euo pipefail

die() { echo "tpu_vm.sh: $*" >&2; exit 2; }
say() { echo "tpu_vm.sh: $*" >&2; }

project='' zone='' name=sammix accelerator=v5litepod-16 runtime=v2-alpha-tpuv5-lite
spot=1 restarts=100 dry=0
while (($#)); do
  case $1 in
    --project=?*) project=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --name=?*) name=${1#*=} ;;
    --accelerator=?*) accelerator=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --on-demand) spot=0 ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) die "$1: no such option; the program's stand after --" ;;
  esac
  shift
done
[[ $project && $zone ]] || die "--project and --zone are needed"
[[ " $*" == *" --workdir=gs://"* ]] || die "after -- give --workdir=gs://...: it outlives the slice"

place=(--project="$project" --zone="$zone")
poll=${POLL_SECONDS:-30}

run() {
  if ((dry)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

create() {
  if ((spot)); then
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
      --accelerator-type="$accelerator" --runtime-version="$runtime" --spot
    while ! ((dry)); do
      case $(request) in
        ACTIVE | SUSPENDED) break ;; # SUSPENDED: served, and taken away again
        FAILED) die "the request for $name failed" ;;
      esac
      sleep "$poll"
    done
  else
    run gcloud compute tpus tpu-vm create "$name" "${place[@]}" \
      --accelerator-type="$accelerator" --version="$runtime"
  fi
}

# State of the request for a Spot slice, and of the slice itself, which is READY or another word;
# nothing where there is none.
request() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' || true
}
slice() {
  gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)' || true
}

# Whether there is something of this name; dies where nobody can tell.
there_is() {
  local kind=$1
  gcloud compute tpus "$kind" describe "$name" "${place[@]}" > "$scratch/answer" 2>&1 && return 0
  grep -q NOT_FOUND "$scratch/answer" && return 1
  cat "$scratch/answer" >&2
  die "cannot tell whether there is a $name: nothing was created"
}

delete() {
  if ((spot)); then
    until ((dry)) || [[ $(request) != SUSPENDING ]]; do sleep "$poll"; done
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

# The images bring an older Python than JAX takes; uv fetches one.
install() {
  run git archive --format=tar.gz --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:sammix.tar.gz" "${place[@]}" --worker=all &&
    on_workers 'set -e
mkdir -p sammix
tar -xzf sammix.tar.gz -C sammix
cd sammix
curl -LsSf https://astral.sh/uv/0.13.9/install.sh | sh
~/.local/bin/uv venv --clear --python 3.12 .venv
~/.local/bin/uv pip install --python .venv/bin/python -c requirements/tested.txt \
  -r requirements/tpu.txt'
}

train() {
  local command kept=${JAX_COMPILATION_CACHE_DIR:-}
  printf -v command '%q ' ${kept:+env "JAX_COMPILATION_CACHE_DIR=$kept"} \
    .venv/bin/python -m sammix_jax.main "$@"
  # In the background, so that a signal to this script is acted on at once.
  on_workers "cd sammix && ${command% }" < /dev/null &
  wait $!
}

# SIGTERM, and time for the save; then the copies of scans go that a killed program left. The brackets keep the pattern from finding its own shell.
stop_program() {
  on_workers "pkill -TERM -f '[s]ammix_jax.main'
for _ in \$(seq 120); do pgrep -f '[s]ammix_jax.main' > /dev/null || break; sleep 1; done
pkill -KILL -f '[s]ammix_jax.main'
rm -rf /tmp/sammix-*"
}

finish() {
  code=$?
  trap - EXIT INT TERM
  rm -rf "$scratch"
  if ((created)) && ! delete; then
    say "$name was not deleted: see that it is not left there, it costs money"
  fi
  exit "$code"
}
interrupted() {
  trap '' INT TERM
  say "stopping: the run saves, then $name is deleted"
  if ((created)); then stop_program || true; fi
  exit 143
}

created=0
scratch=$(mktemp -d)
archive=$scratch/sammix.tar.gz
trap finish EXIT
trap interrupted INT TERM

# What would stay behind is told before anything is paid for.
changed=$(git status --porcelain -- sammix_jax configs requirements requirements.txt weights)
if [[ $changed ]]; then
  ((dry)) || die "not committed, and so not copied to the slice: commit it first
$changed"
  say "not committed: commit it before the run"
fi

if ! ((dry)); then
  if there_is tpu-vm || { ((spot)) && there_is queued-resources; }; then
    die "$name is there already: give another --name, or delete it"
  fi
fi

cuts=0
while true; do
  if ! ((created)); then
    created=1 installed=0 # from here on there may be something to delete
    create
  fi
  code=0
  if ((installed)) || install; then
    installed=1
    train "$@" || code=$?
  else
    code=$?
  fi
  ((code)) || break
  sleep "$poll" # a lost connection is told before the loss of the slice is
  state=$(slice)
  if [[ $state == READY && $code != @(143|255) ]]; then
    say "failed with exit code $code"
    exit "$code"
  fi
  if ((++cuts > restarts)); then
    say "cut off $cuts times; the same command goes on"
    exit "$code"
  fi
  if [[ $state == READY ]]; then
    say "stopped with exit code $code; it goes on"
    stop_program || true # a lost connection leaves it running
  else
    say "the slice is gone (${state:-no answer}); another is asked for"
    delete || true
    created=0
  fi
done
