#!/usr/bin/env bash
# Decode on a GPU with routed experts in host memory, beside its limit and stock SGLang: benchmarks/on_gpu.sh PART…
#   model           a checkpoint of DeepSeek-V2-Lite's shape and four adapters into FOLDER (32 GB, one minute)
#   kernels=METHOD  the expert layers alone, called directly and in a CUDA graph: the limit
#   adapters=METHOD what adapters cost 12 of those layers, in turns; hooks: what they cost a layer with resident experts
#   ours=METHOD     kt-launch, driven with the base, one adapter and four adapters in one batch; all experts on the CPU,
#                   with ours=METHOD@16 the first so many of each layer resident on the GPU, and with most=METHOD@16 those
#                   that ours=METHOD, which must have run, has counted most often
#   eager=METHOD    the same without graphs
#   split=METHOD rank0=METHOD  over two GPUs (server.tp=2): each process its part of every expert, the first one all of them
#   peer=METHOD     the expert layer beside kt-kernel, whose wheel is unpacked in KT_KERNEL, at 1, 4, 16 and 64 tokens
#   paged graph     stock SGLang with paged experts (PAGED_RESIDENT=16 a layer on the GPU), and with all of them on the GPU
# Methods: AMXBF16_SFT, AMXINT8_SFT, AMXINT4_SFT. Three calls of ten minutes on one machine, by what these parts took there:
#   model kernels=AMXBF16_SFT ours=AMXBF16_SFT most=AMXBF16_SFT@16 peer=AMXBF16_SFT      (a first start compiles: 65 s more)
#   kernels=AMXINT8_SFT ours=AMXINT8_SFT most=AMXINT8_SFT@16 peer=AMXINT8_SFT paged graph
#   kernels=AMXINT4_SFT ours=AMXINT4_SFT most=AMXINT4_SFT@16 peer=AMXINT4_SFT adapters=AMXINT4_SFT hooks
# JSON lines on stdout, which OUT/figures.log keeps, with other logs beside it.
#   FOLDER=/tmp/v2-lite  LAYERS=27  OUT=benchmarks/results/gpu  PYTHON=python3  KT_LAUNCH=kt-launch  PAGED_RESIDENT=16
#   WORDS=  more overrides of kt-launch     STOCK=  more arguments of stock SGLang     PREFILLS="512 2048 8192"
#   PICTURES="1 64"  a picture (SVG) of a step at so many requests, and its milliseconds
#   TEMPERATURE=0  1: any token is as likely, so that all models read as many experts
#   DRIVE=  the models that are driven, instead of base, one adapter and four    ROUNDS=2  in which they take turns
#   NCCL=  more of server.extra_args over two GPUs     KT_KERNEL=  the folder of kt-kernel
set -uo pipefail
here=$(dirname "$(readlink -f "$0")")/gpu
folder=${FOLDER:-/tmp/v2-lite} layers=${LAYERS:-27} out=$(readlink -m "${OUT:-benchmarks/results/gpu}") python=${PYTHON:-python3}
launch=${KT_LAUNCH:-kt-launch}
start=$SECONDS
[[ $python != */* ]] || python=$(realpath -s "$python") # a link to it is the environment, not what it names
[[ $launch != */* ]] || launch=$(realpath -s "$launch")
KT_KERNEL=${KT_KERNEL:+$(realpath -s "$KT_KERNEL")}
mkdir -p "$out" && cd "$out" || exit # not in the checkout, whose folder kernels/ would hide a package of that name
exec > >(tee -a figures.log) # what shows the output may keep its end only

say() { echo "== $1 (at $((SECONDS - start)) s)"; }

# wait_for LOG PATTERN PID: until the log has the pattern or the process has ended.
wait_for() {
  for ((i = 0; i < 400; i++)); do
    sleep 1
    grep -qE "$2" "$1" && return 0
    kill -0 "$3" 2>/dev/null || break
  done
  tail -n 40 "$1"
  return 1
}

ours() { # METHOD NAME WORDS…
  local method=$1 name=$2 log=$out/$2.log pid adapters=()
  shift 2
  for adapter in a1 a2 a3 a4; do adapters+=("lora.adapters.$adapter.path=$folder/$adapter"); done
  [ -z "${PICTURES:-}" ] || set -- "$@" server.metrics_port=0 server.admin_key=env:KT_LAUNCH_ADMIN_KEY
  export SGLANG_TORCH_PROFILER_DIR=$out/traces KT_LAUNCH_ADMIN_KEY=${KT_LAUNCH_ADMIN_KEY:-of-this-run}
  # shellcheck disable=SC2086
  "$launch" model=auto "model.path=$folder/base" model.name=v2 lora=none "${adapters[@]}" kt.method="$method" kt.prepare=true \
    kt.packed_cache=off server.context_length=16384 proof.text=warn "$@" ${WORDS:-} >"$log" 2>&1 &
  pid=$!
  if wait_for "$log" '^ready: ' "$pid"; then
    grep '^proof: replayed' "$log"
    # shellcheck disable=SC2086
    "$python" "$here/drive.py" "$(sed -n 's/^ready: //p' "$log")" ${DRIVE:-v2 v2:a1 v2:a1+v2:a2+v2:a3+v2:a4}
    for requests in ${PICTURES:-}; do
      "$python" "$here/picture.py" "$(sed -n 's/^ready: //p' "$log")" "$out/$name-$requests.svg" v2 "$requests"
    done
    nvidia-smi --query-gpu=memory.used --format=csv,noheader
  fi
  kill -INT "$pid" && wait "$pid"
}

over_two() { # METHOD WAY WORDS…: prompts stay on the CPU in both ways
  local extra=${NCCL:-}
  ours "$1" "$2-$1" server.tp=2 "kt.tp_experts=$2" kt.num_gpu_experts=0 kt.gpu_prefill_tokens=off \
    ${extra:+"server.extra_args=[$extra]"}
}

peer() { # METHOD
  "$python" "$here/../run.py" --quick --once --shapes v2-lite --tokens 1,4,16,64 --adapters none,1x8 --torch none \
    --methods "$1" --kt-kernel "${KT_KERNEL:?the folder of kt-kernel}" --json "$out/peer-$1.json"
}

stock() { # NAME ARGUMENTS…
  local log=$out/$1.log pid
  shift
  # shellcheck disable=SC2086
  setsid "$python" -m sglang.launch_server --model-path "$folder/base" --served-model-name v2 --host 127.0.0.1 --port 31000 \
    --context-length 16384 --skip-server-warmup --disable-prefill-cuda-graph "$@" ${STOCK:-} >"$log" 2>&1 &
  pid=$!
  wait_for "$log" 'ready to roll|startup complete' "$pid" && "$python" "$here/drive.py" http://127.0.0.1:31000 v2
  kill -TERM -- "-$pid"
  sleep 4
  kill -KILL -- "-$pid" 2>/dev/null
}

for part; do
  say "$part"
  method=${part#*=}
  case $part in
    model) "$python" "$here/model.py" "$folder" "$layers" ;;
    kernels=*) "$python" "$here/captured_layers.py" "$method" "$((layers - 1))" ;;
    adapters=*) "$python" "$here/adapter_layers.py" "$method" 12 ;;
    hooks) "$python" "$here/hooks.py" ;;
    ours=*@*) ours "${method%@*}" "ours-$method" "kt.num_gpu_experts=${method#*@}" ;;
    ours=*) ours "$method" "ours-$method" kt.num_gpu_experts=0 "kt.record_experts=$out/experts-$method.json" ;;
    most=*@*)
      ours "${method%@*}" "most-$method" "kt.num_gpu_experts=${method#*@}" "kt.expert_profile=$out/experts-${method%@*}.json"
      ;;
    split=* | rank0=*) over_two "$method" "${part%%=*}" ;;
    peer=*) peer "$method" ;;
    eager=*) ours "$method" "eager-$method" kt.num_gpu_experts=0 server.cuda_graph=off ;;
    graph) stock graph --mem-fraction-static 0.8 --cuda-graph-bs-decode 1 4 16 64 ;;
    paged)
      stock paged --mem-fraction-static 0.6 --enable-paged-experts --paged-experts-num-resident "${PAGED_RESIDENT:-16}" \
        --moe-runner-backend triton --cuda-graph-bs-decode 1 2
      ;;
    *) echo "unknown part: $part" && exit 2 ;;
  esac
done
say end
