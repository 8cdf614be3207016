"""What Trimtab does not do, for those who look for a key of it: the answer names what there is instead."""

import re

_ANSWERS = {
    r"(tp|tensor_?(model_)?parallel)(_?(size|degree))?(_size)?": (
        "Trimtab has no tensor parallelism; parallel.ep_size spreads the experts over ranks, parallel.zero_stage "
        "everything else"
    ),
    r"(pp|pipeline_?(model_)?parallel|pipeline_?stages)(_?(size|degree))?(_size)?|num_stages": (
        "Trimtab has no pipeline parallelism; parallel.zero_stage and parallel.ep_size spread a model over ranks, "
        "parallel.recompute saves activations"
    ),
    r"(cp|sp|context_?parallel|sequence_?parallel|ulysses|ring_attention)(_?(size|degree))?": (
        "Trimtab has no context or sequence parallelism: a sequence stays on one rank; data.seq_len says how "
        "long it is, parallel.recompute saves activations"
    ),
    r"(dp|fsdp|data_?parallel|dp_shard|dp_replicate)(_?(size|degree))?": (
        "every rank is data-parallel already; cluster.workers says how many there are, parallel.zero_stage how states "
        "are sharded"
    ),
    r"fp8|float8|fp8_recipe|use_fp8|enable_fp8": (
        'Trimtab does not train in FP8; train.precision is "fp32" or "bf16", and parallel.payload = "fp8" sends '
        "tokens to experts in FP8"
    ),
    r"muon(_.*)?|optimizer|optimizer\.(name|type|kind|optimizer)|optim": (
        "AdamW is the only optimizer, Muon and others are not supported; the section optimizer holds its settings"
    ),
}  # fmt: skip


def answer(dotted: str, value: object = None) -> str:
    """What to say about an unknown key or a value that asks for something unsupported; empty where nothing is known."""
    last = dotted.rpartition(".")[2]
    for pattern, sentence in _ANSWERS.items():
        if re.fullmatch(pattern, last.lower()) or re.fullmatch(pattern, dotted.lower()):
            return sentence
        if isinstance(value, str) and re.fullmatch(pattern, value.lower()):
            return sentence
    return ""
