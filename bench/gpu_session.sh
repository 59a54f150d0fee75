#!/usr/bin/env bash
# The half hour on a GPU, in parts that each take less than nine minutes and stand by themselves.
#
#   bench/gpu_session.sh PART OUT      PART: tests, smoke, kernels, update, memory, rollout, step, profile
#
# PY is the Python to use (default: python3). Rows go to OUT/PART.jsonl, all output to
# OUT/PART.log, its ends to the terminal. A piece that fails or takes too long does not keep the
# next one from running; the exit status says how many did. See docs/gpu-session.md.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?PART} out=${2:?OUT}
PY=${PY:-python3}
PEERS=${PEERS:-trl,liger_kernel,cut_cross_entropy}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/fusedgrpo-triton}
mkdir -p "$out"
rows=$(mktemp -d)
log=$out/$part.log
: >"$log"
failed=0

# limit in seconds, lines to show, name, command
piece() {
  local limit=$1 lines=$2 name=$3 begun=$SECONDS rc=0
  shift 3
  printf '\n== %s\n' "$name" | tee -a "$log"
  timeout -k 5 "$limit" "$@" >"$rows/$name.out" 2>&1 || rc=$?
  cat "$rows/$name.out" >>"$log"
  grep -v -e '^round' -e Warning -e 'warnings.warn' "$rows/$name.out" | tail -n "$lines"
  printf -- '-- %s: status %d after %d s\n' "$name" $rc $((SECONDS - begun)) | tee -a "$log"
  ((rc == 0)) || ((failed += 1))
}

json() { echo --json "$rows/$1.jsonl"; }

# Of a large copy, bytes read and written, in GB/s: what shares of the memory's bandwidth refer to.
bandwidth() {
  $PY - <<'PYTHON'
import torch

a = torch.empty(2**32, dtype=torch.uint8, device="cuda")
b = torch.empty_like(a)
times = []
for _ in range(12):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    b.copy_(a)
    end.record()
    end.synchronize()
    times.append(begin.elapsed_time(end) / 1e3)
print(round(2 * a.numel() / sorted(times)[len(times) // 2] / 1e9))
PYTHON
}

case $part in
rollout | profile)
  BANDWIDTH=${BANDWIDTH:-$(bandwidth)}
  echo "a copy moves $BANDWIDTH GB/s" | tee -a "$log"
  ;;
esac

case $part in
tests)
  piece 420 40 tests $PY -m pytest -m gpu -n "${JOBS:-12}" --dist worksteal --timeout 300 \
    --tb short -rf --durations 8
  ;;
smoke)
  # Every bench once, tiny: what does not run is known before the time is spent.
  piece 60 12 step-quick $PY bench/bench_step.py --device cuda --quick --tokens 16 --rounds 1 --peers trl
  piece 60 12 rollout-quick $PY bench/bench_rollout.py --device cuda --bf16 --four-bit --random tiny \
    --prompts 2 --tokens 12 --rounds 1 --peers hf,trl,cb
  piece 60 8 profile-quick $PY bench/profile_gpu.py --quick
  piece 60 8 memory-quick $PY bench/bench_memory.py --quick --measure
  piece 60 8 logprob-quick $PY bench/bench_linear_logprob.py --quick --rounds 1 --peers "$PEERS"
  piece 60 8 loss-quick $PY bench/bench_policy_loss.py --quick --peers "$PEERS"
  piece 60 8 accuracy-quick $PY bench/bench_accuracy.py --quick --device cuda --peers "$PEERS"
  piece 60 8 decode-quick $PY bench/bench_decode.py --quick --device cuda
  ;;
kernels)
  piece 240 90 linear-logprob $PY bench/bench_linear_logprob.py --peers "$PEERS" $(json linear-logprob)
  piece 90 40 policy-loss $PY bench/bench_policy_loss.py --peers trl $(json policy-loss)
  piece 120 50 accuracy $PY bench/bench_accuracy.py --device cuda --peers "$PEERS" $(json accuracy)
  piece 90 40 decode-kernels $PY bench/bench_decode.py --device cuda $(json decode)
  ;;
update)
  piece 300 80 update $PY bench/bench_update.py --device cuda --peers trl --shapes 1,2 --rounds 3 $(json update)
  ;;
memory)
  piece 500 60 memory $PY bench/bench_memory.py --measure --cases 4,0,1,3,2 $(json memory)
  ;;
rollout)
  for rows_of in ${PROMPTS:-8}; do
    piece 300 40 rollout-$((rows_of * 8)) $PY bench/bench_rollout.py --device cuda --bf16 --four-bit \
      --random 7b --rank 64 --prompts "$rows_of" --prompt-tokens 512 --tokens 256 --rounds 2 --warmup 0 \
      --peers "${ROLLOUT_PEERS:-hf,trl,cb}" --bandwidth "$BANDWIDTH" $(json "rollout-$rows_of")
  done
  ;;
step)
  piece 500 60 step $PY bench/bench_step.py --device cuda --peers trl --rounds 2 $(json step)
  ;;
profile)
  piece 400 200 profile $PY bench/profile_gpu.py ${PROFILE:-} --bandwidth "$BANDWIDTH" $(json profile)
  ;;
*)
  echo "no part $part: tests, smoke, kernels, update, memory, rollout, step, profile" >&2
  exit 2
  ;;
esac
cat "$rows"/*.jsonl >"$out/$part.jsonl" 2>/dev/null || true
exit "$failed"
