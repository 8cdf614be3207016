"""One training of `trimtab bench balance` in a process of its own: the debug launcher's run, then held-out figures.

Run as `python -m launch.bench_balance_worker CONFIG.toml RUN RESULT.json ARM SEED SETTING HELDOUT_EVERY`.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.context import EXIT_OK
from launch import balance_stats
from launch.bench_balance_arms import EP_SIZE
from launch.document_floor import document_floor
from launch.evaluate import predict
from launch.load import load_run
from launch.preflight import check
from launch.runfolder import RunFolder, committed_metrics
from launch.start import report_end, start
from model.count import count_parameters

LAST_SHARE = 0.2  # of the steps, over which the step figures are taken
PREDICT_BATCH = 16


def main(arguments: list[str]) -> int:
    """Trains, or goes on with a training that was interrupted; evaluates; writes the result last and whole."""
    config_path, run_path, result_path, arm, seed, setting, every = arguments
    torch.set_num_threads(1)
    started, busy = time.perf_counter(), time.process_time()
    plan = check(config_path, [], run=run_path, launcher="debug")
    steps_before = len(committed_metrics(RunFolder(plan.run)))
    if not plan.done:
        status = report_end(plan, start(plan, cause="trimtab bench balance"))
        if status != EXIT_OK:
            return status
    trained, busy = time.perf_counter(), time.process_time() - busy
    result: dict[str, Any] = {"arm": arm, "seed": int(seed), "setting": setting, "config": asdict(plan.config)}
    metrics = committed_metrics(RunFolder(plan.run))
    result |= step_figures(metrics)
    new_tokens = metrics[-1]["tokens"] * (1 - steps_before / len(metrics))
    result["tokens_per_second"] = new_tokens / busy if new_tokens else None
    result |= heldout_figures(plan.run, int(every))
    parameters = count_parameters(plan.config.model)
    result |= {"parameters": parameters.total, "active_parameters": parameters.active}
    result |= {"train_seconds": trained - started, "evaluation_seconds": time.perf_counter() - trained}
    unfinished = Path(result_path + ".unfinished")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.replace(result_path)
    return EXIT_OK


def step_figures(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the steps say: medians over the last fifth, and the series to draw.

    A dense model has None in place of every figure of balance.
    """
    last = metrics[-max(1, round(LAST_SHARE * len(metrics))) :]
    found: dict[str, Any] = {
        "train_loss_last": statistics.fmean(one["loss"] for one in last),
        "series": {"loss": [round(one["loss"], 5) for one in metrics], "max_vio": [one["max_vio"] for one in metrics]},
        "step_max_vio": None, "step_floor": None, "step_rank_vio": None, "bias_abs_max": metrics[-1]["bias_abs_max"],
        "changed_by_bias": metrics[-1]["changed_by_bias_share"], "gate_entropy": None,
    }  # fmt: skip
    if metrics[-1]["max_vio"] is not None:
        ranks = [balance_stats.max_vio_rank(one["tokens_per_expert"], EP_SIZE) for one in last]
        found["step_max_vio"] = statistics.median(one["max_vio"] for one in last)
        found["step_floor"] = statistics.median(one["max_vio_floor"] for one in last)
        found["step_rank_vio"] = statistics.median(ranks)
        found["gate_entropy"] = statistics.fmean(one["gate_entropy"] for one in last)
    return found


def heldout_figures(run: Path, every: int = 1) -> dict[str, Any]:
    """Loss and balance over the held-out documents, windows without overlap: every token is routed once."""
    loaded = load_run(run)
    assert loaded.dataset is not None, "the benchmark trains on packed data"
    window = loaded.config.data.seq_len
    with loaded.dataset as dataset:
        documents = list(dataset.heldout_documents())[::every]
        eod_id, lossless = dataset.manifest.eod_id, dataset.lossless
        seen = predict(loaded.model, documents, eod_id, window, stride=window, batch_size=PREDICT_BATCH)
    found = {
        "heldout_loss": seen.loss, "bits_per_byte": seen.bits_per_byte if lossless else None,
        "heldout_tokens": seen.n_tokens,
        "heldout_documents": seen.n_documents, "heldout_max_vio": None, "heldout_floor": None,
        "heldout_document_floor": None, "heldout_rank_vio": None,
    }  # fmt: skip
    by_document = seen.tokens_per_expert.numpy()
    if by_document.shape[1]:
        counts = by_document.sum(axis=0)
        found |= {
            "heldout_max_vio": balance_stats.max_vio(counts),
            "heldout_max_vio_per_layer": np.round(balance_stats.max_vio_per_layer(counts), 5).tolist(),
            "heldout_floor": balance_stats.max_vio_floor(counts),
            "heldout_document_floor": document_floor(by_document),
            "heldout_rank_vio": balance_stats.max_vio_rank(counts, EP_SIZE),
            "heldout_counts": counts.tolist(),
        }
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
