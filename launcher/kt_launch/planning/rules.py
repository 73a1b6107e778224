"""How each value of a plan is found when nobody types it, as data: kt-launch explain shows it.

A config key without a row is what was typed, else what a preset says, else its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """How the value is found, and what else than typing it would change it."""

    how: str
    changes: str = ""


RULES: Mapping[str, Rule] = {
    "model.path": Rule(
        "model.path if given; else the preset's own path; else its folder below paths.models or KT_LAUNCH_MODELS",
        "another model= preset, or another models' root",
    ),
    "model.name": Rule("the preset's name; else the checkpoint folder's name", "another model= preset"),
    "model.family": Rule("config.json's model_type, looked up in the table of families", "another checkpoint"),
    "model.num_experts": Rule("config.json, under the family's own name for it", "another checkpoint"),
    "model.top_k": Rule("config.json, under the family's own name for it", "another checkpoint"),
    "model.hidden_size": Rule("config.json", "another checkpoint"),
    "model.moe_intermediate_size": Rule("config.json, under the family's own name for it", "another checkpoint"),
    "model.moe_layers": Rule(
        "counted from config.json by the family's rule of which layers are dense", "another checkpoint"
    ),
    "model.vocab_size": Rule("config.json; 0 where it does not say", "another checkpoint"),
    "model.sampling": Rule(
        "what requests get that they leave open: generation_config.json, where do_sample: false is a temperature of 0; "
        "OpenAI's defaults where it says nothing",
        "server.extra_args=[--sampling-defaults,openai]",
    ),
    "lora.*.path": Rule(
        "lora.path if given; else the preset's path; else its folder below paths.loras, KT_LAUNCH_LORAS or the models' "
        "root",
        "another lora= preset, or another adapters' root",
    ),
    "lora.*.revision": Rule("the commit that the revision means in the Hub's cache", "lora.adapters.*.revision"),
    "lora.*.checkpoint": Rule(
        "a folder without an adapter_config.json of its own, but with checkpoint-N folders that have one, means the "
        "highest step; with one of its own it means itself, the final adapter",
        "lora.path=/path/to/folder/checkpoint-N for another",
    ),
    "lora.*.rank": Rule("adapter_config.json", "another adapter"),
    "lora.*.alpha": Rule("adapter_config.json", "another adapter"),
    "lora.*.scale": Rule(
        "alpha / rank, or alpha / sqrt(rank) when adapter_config.json says use_rslora", "another adapter"
    ),
    "lora.*.layout": Rule(
        "lora.layout if given; else lora_B_layout in adapter_config.json; else the order in which the columns of one "
        "expert's B are alike; else PEFT's",
        "lora.layout, or another adapter",
    ),
    "lora.*.reaches": Rule(
        "the names of the adapter's tensors: low-rank pairs, counted by what they change", "another adapter"
    ),
    "lora.*.expert_pairs": Rule(
        "of these pairs, those on routed experts; if there are any, the proof expects their rows in kt_kernels",
        "another adapter",
    ),
    "lora.max_rank": Rule(
        "the largest rank of the chosen adapters; 16 with lora=none when lora.max_per_batch, lora.target_modules or "
        "lora.allow is given",
        "other adapters",
    ),
    "lora.max_per_batch": Rule(
        "the number of chosen adapters, and one for the base model; 2 with lora=none when lora.max_rank, "
        "lora.target_modules or lora.allow is given",
        "more or fewer adapters",
    ),
    "lora.target_modules": Rule(
        "the modules that the chosen adapters change; with lora=none when lora.max_rank, lora.max_per_batch or "
        "lora.allow is given, every module for which SGLang has LoRA. gate_proj, up_proj and down_proj come together",
        "other adapters, another model",
    ),
    "lora.allow": Rule(
        "the parents of the chosen adapters' folders, or their repositories in the Hugging Face cache; with lora=none "
        "paths.loras, KT_LAUNCH_LORAS or the models' root, where one of them is given, else none. The folders of the "
        "chosen adapters themselves are always allowed",
        "other adapters, another adapters' root",
    ),
    "kt.method": Rule("bf16 unless chosen", "kt=int8 or kt=int4"),
    "kt.weight_path": Rule(
        "by method: bf16 reads the checkpoint, int8 and int4 read a folder of quantized experts, "
        "the one given, else ours in the cache, else ours next to the model, as <model>-CPU-weight-INT8",
        "another kt.method",
    ),
    "kt.packed_entry": Rule(
        "below the cache folder, named by the hashes of the weights' files, the method, and the kernels' layout",
        "KT_LAUNCH_CACHE, kt.packed_cache=off, kt.method, kt.threadpool_count",
    ),
    "kt.cpuinfer": Rule(
        "the smallest of: physical cores that this process may use, CPUs in its affinity, whole CPUs of its cgroup "
        "quota. One thread per core: a second thread on a core shares its arithmetic units and gains nothing. With "
        "server.tp on GPUs some cores stay free for its processes and NCCL: one for each process, or two for each with "
        "kt.tp_experts=rank0, at most half",
        "taskset, a container's CPU limit, server.tp, another machine",
    ),
    "kt.threadpool_count": Rule(
        "the NUMA nodes with CPUs that this process may use, so that each pool reads its own node's memory; "
        "never more than threads",
        "taskset or a cpuset, another machine",
    ),
    "kt.tp_experts": Rule(
        "split: each process of server.tp computes its part of every expert, and SGLang adds the parts up. With rank0 "
        "the first computes whole experts and the others give zeros to the same sum: one set of threads in the place "
        "of several, all memory behind it, and the packed experts of server.tp=1. On two GPUs split is within 5 % of "
        "it from 4 requests on (4 to 13 % slower at one), needs fewer free cores, keeps each process on its own NUMA "
        "node, and brings the experts of long prompts to all cards",
        "kt.tp_experts",
    ),
    "kt.pools": Rule(
        "each pool keeps its threads on one NUMA node's CPUs and its share of every expert in that node's memory; a "
        "single pool is not bound",
        "kt.cpuinfer, kt.threadpool_count, taskset or a cpuset",
    ),
    "kt.instruction_set": Rule(
        "the best of amx, avx512_bf16, avx512, avx2 and reference that the CPU has and the kernel permits",
        "another CPU; for AMX also Linux 5.16 and a container that lets arch_prctl through",
    ),
    "run.folder": Rule(
        "a new folder below paths.runs, KT_LAUNCH_RUNS or the user's state folder, named by time and model, made when "
        "a server is started",
        "paths.runs, KT_LAUNCH_RUNS",
    ),
    "model.disk": Rule("what the kernel reports about the checkpoint's disk", "another disk"),
    "fit": Rule(
        "bytes that the launch will take from each memory, computed from the shapes in config.json, the packed layout "
        "of kt.method, the adapters and the server's limits",
        "kt.method, server.context_length, server.max_total_tokens, lora.max_per_batch, server.fit=warn",
    ),
    "fit.free": Rule(
        "bytes free now in each memory: the smaller of what the machine has available and what its cgroup leaves; for "
        "SGLang's share, server.mem_fraction of that",
        "what else runs, a container's memory limit, server.mem_fraction",
    ),
    "kt.num_gpu_experts": Rule(
        "0: all routed experts run on the CPU. auto takes on a GPU the largest multiple of an eighth of the experts, "
        "fewer than all of them, that leaves the KV cache as much memory as they take",
        "kt.num_gpu_experts=auto, what else the GPU's memory holds, server.mem_fraction, server.max_total_tokens",
    ),
    "kt.gpu_prefill_tokens": Rule(
        "off without a GPU, and where not even the smallest buffers fit beside the rest; off with server.dp and "
        "server.nodes, which have not run on a card this way, and with kt.tp_experts=rank0, where one card would bring "
        "all; else auto. With auto each start measures a layer both ways at 32 to 8192 tokens and takes the GPU from "
        "where it is faster; no batch comes there before "
        "every layer has been compared with kt_kernels",
        "kt.gpu_prefill_tokens, kt.gpu_prefill_gib, server.device",
    ),
    "kt.gpu_prefill_gib": Rule(
        "up to about 1.5: pieces of packed experts, at best for a whole layer, and one unpacked; fewer pieces, or more "
        "memory, where experts are large; fewer and smaller pieces, down to two experts and one unpacked, where no "
        "more fits beside the rest",
        "kt.gpu_prefill_gib, what else the GPU's memory holds, server.context_length, server.max_total_tokens",
    ),
    "server.chunked_prefill_size": Rule(
        "8192 where experts come to a GPU of 60 GiB and more, else SGLang chooses: all experts come once a step, and "
        "requests that are being answered wait for a step",
        "kt.gpu_prefill_tokens, server.device",
    ),
    "server.device": Rule(
        "cuda when nvidia-smi lists a GPU that CUDA_VISIBLE_DEVICES leaves and torch is not a CPU build; else cpu",
        "CUDA_VISIBLE_DEVICES, another build of torch, server=cpu",
    ),
    "server.node_rank": Rule("SLURM_NODEID or LWS_WORKER_INDEX when not given", "the batch system"),
    "server.rendezvous": Rule(
        "when not given port 29500 of the first host of SLURM_JOB_NODELIST, or of LWS_LEADER_ADDRESS",
        "the batch system",
    ),
    "server.processes": Rule(
        "neighbouring physical cores of this host, whole NUMA nodes where their number allows, as many for each of the "
        "server.tp x server.dp processes, shared out to server.nodes hosts; its expert threads run there, and its "
        "memory is that of their nodes. With kt.tp_experts=rank0 the first of each server.tp has the cores of all",
        "server.tp, server.dp, server.nodes, kt.tp_experts, taskset or a cpuset",
    ),
    "server.port": Rule("0 takes a port that is free now; one that is busy is refused, with its owner named"),
    "server.attention_backend": Rule(
        "torch_native on a CPU; on a GPU SGLang chooses, but triton where latent attention of 256 + 32 needs it",
        "server.device, model.path",
    ),
    "server.sampling_backend": Rule("pytorch on a CPU; on a GPU SGLang chooses", "server.device"),
    "server.lora_backend": Rule("torch_native on a CPU, triton on a GPU", "server.device"),
    "server.context_length": Rule(
        "on a CPU 4096 or what the model was made for, whichever is less; on a GPU SGLang chooses. On both at most "
        "the sliding window of the model's attention, where it has one",
        "server.device",
    ),
    "server.max_running_requests": Rule("4 on a CPU; on a GPU SGLang chooses", "server.device"),
    "server.max_total_tokens": Rule(
        "on a CPU context_length x max_running_requests; on a GPU SGLang chooses",
        "server.context_length, server.max_running_requests, server.device",
    ),
    "server.mem_fraction": Rule(
        "on a CPU 0.8, or as much more as the experts need to fit; on a GPU SGLang chooses", "server.device"
    ),
    "proof.whole_model": Rule(
        "auto where the checkpoint is at most proof.whole_model_gib on disk, transformers is installed and the memory "
        "that the server leaves holds the model in float32; else off",
        "proof.whole_model, proof.whole_model_gib, free memory",
    ),
    "server.cuda_graph": Rule(
        "off on a CPU; decode on a GPU: a replayed decode step calls the kernels from the stream, and each start "
        "proves that it matches an eager step, for the base and for each adapter",
        "server.device, server.attention_backend, server.lora_backend",
    ),
}


def rule_of(key: str) -> Rule | None:
    """The row of a key; rows of adapters apply to every name."""
    if key in RULES:
        return RULES[key]
    head, _, leaf = key.rpartition(".")
    return RULES.get(f"{head.partition('.')[0]}.*.{leaf}") if "." in head else None
