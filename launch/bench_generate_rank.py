"""One way of generating, measured in a fresh process of `trimtab bench generate`."""

# B prompts, P tokens of each, n new tokens

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.evaluate import predict
from launch.load import LoadedRun, load_run
from model.config import ModelConfig
from model.drafts import Drafter, ModelDrafts, ModuleDrafts
from model.exchange import LocalExchange
from model.generation import Counts, Generation, Request
from model.init import init_weights
from model.quantize import quantize
from model.sampling import Sampling
from model.transformer import Transformer


@dataclass(frozen=True)
class Way:
    """How to generate. draft: `mtp`, `run` or none; bits: 32, or those of quantised weights; experts: transformers'
    way of computing them, empty for ours; packages it needs."""

    bits: int = 32
    draft: str = ""
    cached: bool = True
    experts: str = ""
    packages: tuple[str, ...] = ()


OURS = "trimtab"
WAYS: dict[str, Way] = {
    OURS: Way(),
    "trimtab, no cache": Way(cached=False),
    "trimtab int8": Way(bits=8),
    "trimtab int4": Way(bits=4),
    "trimtab mtp": Way(draft="mtp"),
    "trimtab draft run": Way(draft="run"),
    "trimtab int8 mtp": Way(bits=8, draft="mtp"),
    "transformers eager": Way(experts="eager", packages=("transformers",)),
    "transformers grouped_mm": Way(experts="grouped_mm", packages=("transformers",)),
}

Tokens = list[list[int]]
Made = tuple[Tokens, Counts | None]


def measure(job: dict[str, Any], rank: int, n_ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Generates greedily, our plain way and the asked one in turns, `inner` times each after once to warm up.

    In turns, call by call, because a machine that others use is faster or slower for seconds at a time. Each pair of
    calls gets prompts a token longer than the last, as no two are alike in use: who prepares for a length pays for it.

    Args:
        job: way; run (a folder) or model (a table) and seed; draft (a folder) for drafting with a second run;
            batches, prompt_tokens, new_tokens, inner.

    Returns:
        By way, for each batch size: batch, seconds of whole generations and of ones that end after the first token,
        tokens (B, n), acceptance and forwards (None without drafts), weight_bytes.
    """
    ways = [_Measured(name, job) for name in dict.fromkeys((OURS, job["way"]))]
    for batch in job["batches"]:
        length = job["prompt_tokens"]
        prompts = _prompts(ways[0].loaded, ways[0].config, batch, length)
        for way in ways:
            way.begin(batch, prompts, job["new_tokens"])
        for _ in range(job["inner"]):
            for n_new, kind in ((job["new_tokens"], "whole"), (1, "first")):
                length += 1
                prompts = _prompts(ways[0].loaded, ways[0].config, batch, length)
                for way in ways:
                    way.found[-1][kind].append(_seconds(partial(way.make, prompts, n_new)))
    return {way.name: way.found for way in ways}


class _Measured:
    """A way, ready to run, and what was found of it."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        way = WAYS[name]
        model, self.loaded = _model(job)
        self.name, self.config, self.found = name, model.config, list[dict[str, Any]]()
        self._weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if way.bits != 32:
            self._weight_bytes = quantize(model, 8 if way.bits == 8 else 4).after
        self.make: Callable[[Tokens, int], Made]
        if way.experts:
            self.make = _transformers(model, way.experts)
        elif way.cached:
            self.make = _cached(model, _drafter(model, way, job))
        else:
            self.make = _uncached(model)

    def begin(self, batch: int, prompts: Tokens, n_new: int) -> None:
        """The first generation of a batch size, not timed: its tokens are compared."""
        tokens, counts = self.make(prompts, n_new)
        self.found.append({
            "batch": batch, "whole": [], "first": [], "tokens": tokens, "weight_bytes": self._weight_bytes,
            "acceptance": counts.acceptance if counts else None, "forwards": counts.steps if counts else None,
        })  # fmt: skip


def heldout(job: dict[str, Any], rank: int, n_ranks: int) -> dict[str, Any]:
    """A run's held-out loss with weights of 32, 8 and 4 bits, and the weights' bytes.

    Bits per byte are None where the tokens do not stand for all bytes.

    Args:
        job: run (a folder), documents (how many at most, 0 for all).
    """
    found: dict[str, Any] = {}
    for bits in (32, 8, 4):
        loaded = load_run(Path(job["run"]))
        if loaded.dataset is None:
            return {}
        with loaded.dataset as dataset:
            documents = list(dataset.heldout_documents())[: job["documents"] or None]
            model = loaded.model
            size = sum(parameter.nbytes for parameter in model.parameters())
            if bits != 32:
                size = quantize(model, 8 if bits == 8 else 4).after
            result = predict(model, documents, dataset.manifest.eod_id, loaded.config.data.seq_len)
            lossless = dataset.lossless and bool(documents)
        found[str(bits)] = {
            "bits_per_byte": result.bits_per_byte if lossless else None, "loss": result.loss, "weight_bytes": size,
            "heldout_bytes": result.raw_bytes,
        }  # fmt: skip
    return found


def _model(job: dict[str, Any]) -> tuple[Transformer, LoadedRun | None]:
    if job.get("run"):
        loaded = load_run(Path(job["run"]))
        return loaded.model, loaded
    model = Transformer(ModelConfig.from_dict(job["model"]), LocalExchange())
    init_weights(model, job["seed"])
    return model.eval(), None


def _prompts(loaded: LoadedRun | None, config: ModelConfig, batch: int, length: int) -> Tokens:
    """Held-out text of the run, one piece behind the other, or random tokens."""
    if loaded is None or loaded.dataset is None:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(0, config.vocab_size, (batch, length), generator=draw).tolist()
    stream: list[int] = []
    for document in loaded.dataset.heldout_documents():
        stream += document.tokens.tolist()
        if len(stream) >= batch * length:
            break
    return [stream[row * length :][:length] for row in range(batch)]


def _drafter(model: Transformer, way: Way, job: dict[str, Any]) -> Callable[[int], Drafter] | None:
    if way.draft == "mtp":
        return lambda rows: ModuleDrafts(model, rows)
    if way.draft == "run":
        second = load_run(Path(job["draft"])).model
        return lambda rows: ModelDrafts(second, rows, job["draft_tokens"])
    return None


def _cached(model: Transformer, drafter: Callable[[int], Drafter] | None) -> Callable[[Tokens, int], Made]:
    def make(prompts: Tokens, n_new: int) -> Made:
        requests = [Request(prompt, n_new) for prompt in prompts]
        generation = Generation(model, requests, Sampling(), batch=len(prompts), drafter=drafter)
        made: Tokens = [[] for _ in prompts]
        while not generation.done:
            for event in generation.step():
                made[event.request] += event.tokens
        return made, generation.counts

    return make


def _uncached(model: Transformer) -> Callable[[Tokens, int], Made]:
    @torch.no_grad()
    def make(prompts: Tokens, n_new: int) -> Made:
        tokens = torch.tensor(prompts)
        for _ in range(n_new):
            logits = model(tokens).logits
            assert logits is not None
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        return tokens[:, -n_new:].tolist(), None

    return make


def _transformers(model: Transformer, experts: str) -> Callable[[Tokens, int], Made]:
    """DeepseekV3ForCausalLM.generate with its own cache and the same weights."""
    from transformers import DeepseekV3ForCausalLM

    from launch.bench_hf import hf_config

    peer = DeepseekV3ForCausalLM(hf_config(model.config, experts)).float().eval()
    weights: dict[str, Tensor] = {
        name if name.startswith("lm_head.") else f"model.{name}": value
        for name, value in model.state_dict().items()
        if not name.startswith("mtp.")
    }
    peer.load_state_dict(weights)

    def make(prompts: Tokens, n_new: int) -> Made:
        ids = torch.tensor(prompts)
        made = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False, use_cache=True,
            pad_token_id=0,
        )  # fmt: skip
        return made[:, ids.shape[1] :].tolist(), None

    return make


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
