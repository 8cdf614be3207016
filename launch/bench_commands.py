"""`trimtab bench NAME`: each benchmark runs its peers in the same call and prints a table."""

import argparse
from pathlib import Path
from typing import Any

from launch.arguments import add_json
from launch.bench_balance_arms import OTHERS, RULES


def add_bench_commands(commands: Any) -> None:
    """Adds the `bench` command and its benchmarks to a parser's subcommands."""
    bench = commands.add_parser(
        "bench",
        help="Measure, beside others in the same call.",
        description="Measures, beside others in the same call; the results go to a folder as CSV, JSON and picture.",
        epilog="example: trimtab bench dispatch --ranks 2 --out runs/bench-dispatch",
    )
    names = bench.add_subparsers(dest="benchmark", metavar="NAME")
    _add_loader(names)
    _add_dispatch(names)
    _add_kernels(names)
    _add_balance(names)
    _add_scaling(names)
    _add_moe(names)
    _add_step(names)
    _add_generate(names)


def _add_loader(names: Any) -> None:
    loader = names.add_parser(
        "loader",
        help="tokens/s and resume time of the data stream beside other loaders",
        description="Reads the same synthetic documents with this project's stream and with others: webdataset, "
        "MosaicML streaming and Energon where they are installed, memory-mapped tokens. Each gives batches of "
        "the same shape, int64 torch tensors of tokens and targets, in one process.",
        epilog="example: trimtab bench loader --megatokens 50 --seq-len 2048 --repeats 5 --out runs/bench-loader",
    )
    loader.add_argument("--megatokens", type=float, default=8, help="size of the data, in million tokens (default: 8)")
    loader.add_argument("--seq-len", type=int, default=1024, help="targets in a sequence (default: 1024)")
    loader.add_argument("--batch", type=int, default=64, help="sequences in a step (default: 64)")
    loader.add_argument("--micro-batch", type=int, default=8, help="sequences in a tensor (default: 8)")
    loader.add_argument(
        "--packing", choices=("split", "best_fit"), default="split", help="as data.packing (default: split)"
    )
    loader.add_argument("--repeats", type=int, default=5, help="timed passes over the data (default: 5)")
    loader.add_argument(
        "--resume-samples", type=int, default=100_000, help="documents read before the resume (default: 100000)"
    )
    loader.add_argument(
        "--index-documents", type=int, default=0,
        help="also time the resume on a synthetic index of so many documents, for example 10000000 (default: 0, not)",
    )  # fmt: skip
    loader.add_argument("--out", type=Path, default=Path("runs/bench-loader"), help="folder for CSV, JSON and plot")
    add_json(loader)
    loader.set_defaults(run_command=_run_loader)


def _run_loader(options: argparse.Namespace) -> int:
    from launch.bench_loader import run

    return run(options)


def _add_dispatch(names: Any) -> None:
    dispatch = names.add_parser(
        "dispatch",
        help="time and bytes of sending tokens to experts and back, beside plain all-to-alls",
        description="Starts ranks on this machine (Gloo, one thread each) and sends the same tokens every way that "
        "parallel.dispatch knows, with torch's all_to_all_single and mpi4py's Alltoallv beside them; then a whole "
        "layer with its transfers hidden behind work and not. With --nodes the link between nodes is modelled.",
        epilog="example: trimtab bench dispatch --ranks 4 --nodes 2 --gigabits 1 --out runs/bench-dispatch",
    )
    dispatch.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    dispatch.add_argument("--nodes", type=int, default=1, help="modelled nodes that the ranks are on (default: 1)")
    dispatch.add_argument("--gigabits", type=float, default=1.0, help="a rank's link between nodes (default: 1)")
    dispatch.add_argument("--latency-us", type=float, default=50.0, help="of that link, microseconds (default: 50)")
    dispatch.add_argument("--tokens", type=int, default=2048, help="of each rank (default: 2048)")
    dispatch.add_argument("--hidden", type=int, default=256, help="width of a token's vector (default: 256)")
    dispatch.add_argument("--width", type=int, default=128, help="of an expert (default: 128)")
    dispatch.add_argument("--experts", type=int, default=16, help="in all (default: 16)")
    dispatch.add_argument("--top-k", type=int, default=4, help="experts of a token (default: 4)")
    dispatch.add_argument("--repeats", type=int, default=9, help="timed runs of each way (default: 9)")
    dispatch.add_argument("--out", type=Path, default=Path("runs/bench-dispatch"), help="folder for CSV, JSON and plot")
    add_json(dispatch)
    dispatch.set_defaults(run_command=_run_dispatch)


def _run_dispatch(options: argparse.Namespace) -> int:
    from launch.bench_dispatch import run

    return run(options)


def _add_kernels(names: Any) -> None:
    kernels = names.add_parser(
        "kernels",
        help="each kernel beside its reference, torch's own and Liger's",
        description="Times every operation of kernels/ forward and backward, with peak memory, TFLOP/s and GB/s from "
        "shapes, natural and forced-even routing side by side. Needs torch, triton and numpy. On a GPU the default "
        "shapes are of a model of 30 billion parameters, on a CPU small ones.",
        epilog="example: trimtab bench kernels --only experts_mlp,permute --tokens 32768 --out runs/bench-kernels",
    )
    kernels.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    kernels.add_argument("--only", help="operations or parts of their names, with commas between (default: all)")
    kernels.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: 7)")
    kernels.add_argument("--threads", type=int, default=1, help="threads on a CPU (default: 1)")
    kernels.add_argument("--tokens", type=int, help="T (default: 32768 on a GPU, 1024 on a CPU)")
    kernels.add_argument("--hidden", type=int, help="H (default: 2048, 256)")
    kernels.add_argument("--width", type=int, help="I, of an expert (default: 768, 128)")
    kernels.add_argument("--experts", type=int, help="E (default: 128, 16)")
    kernels.add_argument("--top-k", type=int, help="K (default: 8, 4)")
    kernels.add_argument("--vocab", type=int, help="V of the cross-entropy (default: 129280)")
    kernels.add_argument("--vocab-tokens", type=int, help="T of the cross-entropy (default: 8192, 512)")
    kernels.add_argument("--vocab-hidden", type=int, help="H of the cross-entropy (default: 2048, 256)")
    kernels.add_argument("--cache", type=Path, help="folder of tile sizes measured (default: ~/.cache/trimtab/kernels)")
    kernels.add_argument("--out", type=Path, default=Path("runs/bench-kernels"), help="folder for CSV, JSON and plot")
    add_json(kernels)
    kernels.set_defaults(run_command=_run_kernels)


def _run_kernels(options: argparse.Namespace) -> int:
    from launch.bench_kernels import run

    return run(options)


def _add_balance(names: Any) -> None:
    balance = names.add_parser(
        "balance",
        help="loss, balance and speed under every balance rule, over several seeds",
        description="Trains the same small model on the same tokens under every rule, beside aux_loss with the "
        "literature's coefficient, a dense model of equal active parameters and one with two experts a token; or "
        "measures how fast each rule evens out a skewed router.",
        epilog="example: trimtab bench balance --seeds 3 --jobs 2 --out runs/bench-balance",
    )
    balance.add_argument(
        "--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE",
        help=f"among {', '.join(RULES)} (default: all)",
    )  # fmt: skip
    balance.add_argument(
        "--also", nargs="*", choices=OTHERS, default=list(OTHERS),
        help=f"trainings beside the rules, or nothing: {', '.join(OTHERS)} (default: all)",
    )  # fmt: skip
    balance.add_argument("--seeds", type=int, default=3, help="seeds of weights and data order (default: 3)")
    balance.add_argument("--steps", type=int, default=600, help="optimizer steps of a training (default: 600)")
    balance.add_argument("--jobs", type=int, default=1, help="trainings side by side, one thread each (default: 1)")
    balance.add_argument("--data", type=Path, help="a packed dataset (default: passages of the Python library)")
    balance.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the shared configuration; repeatable"
    )
    balance.add_argument("--search", action="store_true", help="try every rule's settings instead, under another seed")
    balance.add_argument(
        "--skew", action="store_true", help="updates that each rule needs from a skewed router instead"
    )
    balance.add_argument("--out", type=Path, default=Path("runs/bench-balance"), help="folder for all results")
    add_json(balance)
    balance.set_defaults(run_command=_run_balance)


def _run_balance(options: argparse.Namespace) -> int:
    from launch.bench_balance import run

    return run(options)


def _add_scaling(names: Any) -> None:
    scaling = names.add_parser(
        "scaling",
        help="weak and strong scaling of whole training runs, and what the efficiency is lost to",
        description="Trains the same model at several numbers of ranks through the usual launchers, in turns; says "
        "what efficiency is lost to, whether the losses agree, and fits the network. Interrupted, the same command "
        "goes on.",
        epilog="example: trimtab bench scaling --preset debug --sizes 1 2 --repeats 3 --out runs/bench-scaling",
    )
    scaling.add_argument("--preset", default="debug", metavar="CONFIG", help="a preset or a TOML file (default: debug)")
    scaling.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration; repeatable"
    )
    scaling.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4], help="ranks (default: 1 2 4)")
    scaling.add_argument("--base", type=int, default=0, help="the size compared with (default: the smallest)")
    scaling.add_argument(
        "--modes",
        nargs="+",
        choices=("strong", "weak"),
        default=["strong", "weak"],
        help="global batch fixed, or grown with the ranks (default: both)",
    )
    scaling.add_argument(
        "--routings", nargs="+", choices=("natural", "even"), default=["natural", "even"],
        help="as the router chooses, or forced to be even (default: both)",
    )  # fmt: skip
    scaling.add_argument("--micro-batch", type=int, default=2, help="sequences a rank and forward (default: 2)")
    scaling.add_argument(
        "--global-batch", type=int, default=0,
        help="sequences a step, of weak scaling at the base (default: --micro-batch at the largest size)",
    )  # fmt: skip
    scaling.add_argument("--ep-size", type=int, default=0, help="at most (default: the configuration's)")
    scaling.add_argument("--steps", type=int, default=8, help="measured steps of a run (default: 8)")
    scaling.add_argument("--warm-up", type=int, default=4, help="steps before them (default: 4)")
    scaling.add_argument("--repeats", type=int, default=3, help="runs of each size (default: 3)")
    scaling.add_argument("--threads", type=int, default=1, help="of each rank (default: 1)")
    scaling.add_argument(
        "--launcher", choices=("local", "ray"), default="local",
        help="ray: on the cluster that RAY_ADDRESS names, else on a local one started for this",
    )  # fmt: skip
    scaling.add_argument("--ranks-per-node", type=int, default=0, help="with ray, more ranks take more nodes")
    scaling.add_argument("--out", type=Path, default=Path("runs/bench-scaling"), help="folder for all results")
    add_json(scaling)
    scaling.set_defaults(run_command=_run_scaling)


def _run_scaling(options: argparse.Namespace) -> int:
    from launch.bench_scaling import run

    return run(options)


def _add_moe(names: Any) -> None:
    moe = names.add_parser(
        "moe",
        help="one expert layer, forward and backward, beside transformers' and DeepSpeed's",
        description="One layer from the same weights on the same tokens, in fresh processes in turns: ours, "
        "transformers with eager and grouped_mm experts, DeepSpeed's AutoEP with both, DeepSpeed's own MoE; natural "
        "and forced-even routing. Every layer is compared with the plain one in float64. Peers that are not installed "
        "are named; transformers must be installed beside the same torch.",
        epilog="example: trimtab bench moe --ranks 1 2 --repeats 3 --out runs/bench-moe",
    )
    moe.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    moe.add_argument("--batch", type=int, default=4, help="sequences of each rank (default: 4)")
    moe.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence (default: 512)")
    moe.add_argument("--hidden", type=int, default=256, help="width of a token's vector (default: 256)")
    moe.add_argument("--width", type=int, default=128, help="of an expert (default: 128)")
    moe.add_argument("--experts", type=int, default=16, help="in all (default: 16)")
    moe.add_argument("--top-k", type=int, default=4, help="experts of a token (default: 4)")
    moe.add_argument("--only", help="ways, with semicolons between (default: all)")
    moe.add_argument("--repeats", type=int, default=3, help="fresh processes for each way (default: 3)")
    moe.add_argument("--inner", type=int, default=15, help="timed runs in each of them (default: 15)")
    moe.add_argument("--out", type=Path, default=Path("runs/bench-moe"), help="folder for CSV, JSON and plot")
    add_json(moe)
    moe.set_defaults(run_command=_run_moe)


def _run_moe(options: argparse.Namespace) -> int:
    from launch.bench_moe import run

    return run(options)


def _add_step(names: Any) -> None:
    step = names.add_parser(
        "step",
        help="whole training steps beside DeepSpeed's AutoEP and data-parallel transformers",
        description="Trains one DeepseekV3Config from the same weights on the same tokens, in fresh processes in "
        "turns: our train loop with experts on different ranks and not, DeepSpeed's AutoEP, data-parallel "
        "transformers with eager and grouped_mm experts; natural, then forced-even routing. Reports the loss of the "
        "first and last step beside speed and memory.",
        epilog="example: trimtab bench step --repeats 3 --out runs/bench-step",
    )
    step.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    step.add_argument("--batch", type=int, default=4, help="sequences of each rank (default: 4)")
    step.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence (default: 512)")
    step.add_argument("--hidden", type=int, default=256, help="width of a token's vector (default: 256)")
    step.add_argument("--width", type=int, default=128, help="of an expert (default: 128)")
    step.add_argument("--experts", type=int, default=16, help="in all (default: 16)")
    step.add_argument("--top-k", type=int, default=4, help="experts of a token (default: 4)")
    step.add_argument("--layers", type=int, default=4, help="all of them with experts (default: 4)")
    step.add_argument("--vocab", type=int, default=2048, help="words (default: 2048)")
    step.add_argument("--only", help="ways, with semicolons between (default: all)")
    step.add_argument("--repeats", type=int, default=3, help="fresh processes for each way (default: 3)")
    step.add_argument("--steps", type=int, default=4, help="timed steps of each routing in each (default: 4)")
    step.add_argument("--warm-up", type=int, default=2, help="steps before them (default: 2)")
    step.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    step.add_argument("--profile", action="store_true", help="also say which operations our step's time goes to")
    step.add_argument("--out", type=Path, default=Path("runs/bench-step"), help="folder for CSV, JSON and plot")
    add_json(step)
    step.set_defaults(run_command=_run_step)


def _run_step(options: argparse.Namespace) -> int:
    from launch.bench_step import run

    return run(options)


def _add_generate(names: Any) -> None:
    generate = names.add_parser(
        "generate",
        help="tokens a second beside transformers' generate, with drafts and rounded weights",
        description="Completes the same prompts greedily from the same weights, in fresh processes in turns: ours with "
        "the latent cache and without, with drafts, with int8 and int4 weights; transformers with eager and grouped_mm "
        "experts and its own cache. With --run also the held-out bits per byte of rounded weights.",
        epilog="example: trimtab bench generate --run runs/debug --batches 1 8 --out runs/bench-generate",
    )
    generate.add_argument("--run", type=Path, help="weights and prompts of this run (default: random ones)")
    generate.add_argument("--config", default="debug", help="without --run: a preset or a TOML file (default: debug)")
    generate.add_argument("--draft", type=Path, metavar="RUN", help="a smaller run with the same data, to draft with")
    generate.add_argument("--draft-tokens", type=int, default=4, help="drafts a step of that run (default: 4)")
    generate.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time (default: 1 8)")
    generate.add_argument(
        "--prompt-tokens", type=int, default=128, help="of the first prompts; each call's have one more (default: 128)"
    )
    generate.add_argument("--new-tokens", type=int, default=64, help="for each prompt (default: 64)")
    generate.add_argument("--documents", type=int, default=0, help="held-out documents at most (default: 0, all)")
    generate.add_argument("--no-heldout", action="store_true", help="leave the held-out bits per byte out")
    generate.add_argument("--only", help="ways, with semicolons between (default: all)")
    generate.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    generate.add_argument("--repeats", type=int, default=3, help="fresh processes for each way (default: 3)")
    generate.add_argument("--inner", type=int, default=3, help="timed runs in each of them (default: 3)")
    generate.add_argument("--out", type=Path, default=Path("runs/bench-generate"), help="folder for CSV, JSON and plot")
    add_json(generate)
    generate.set_defaults(run_command=_run_generate, joins_refused=True)


def _run_generate(options: argparse.Namespace) -> int:
    from launch.bench_generate import run

    return run(options)
