"""DeepSpeed ZeRO stages 0 to 3 around a model whose experts are spread over ranks.

DeepSpeed shards non-expert parameters over all ranks and expert parameters over the ranks that hold the same experts,
if it is told which is which. What it looks for (0.19), all of it in this file:

- on each expert parameter: `allreduce = False`, `group_name`, and for stage 3 `ds_zero_placement_family` and
  `ds_zero_partition_group_name`;
- some module in the model that is an instance of its `MoE` (stages 0 to 2) or `AutoEPMoELayer` (stage 3); an empty one
  is enough, its `__init__` need not run, and its method `set_deepspeed_parallelism` is where groups are registered.

The gradient norm is computed here, for all stages in one way and before the step is judged: in stages 1 to 3 every
gradient element lives on exactly one rank, so the sum of squares over all ranks is the true norm; in stage 0 DeepSpeed
would average the norms of ranks that hold different experts.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.naming import is_expert
from parallel.collective_waits import Waits, count_waits
from parallel.config import OptimizerConfig
from parallel.engine import KINDS, StateShard, fresh_moments, parameter_groups
from parallel.layout import Layout, slice_bounds

_MOST_IN_BUCKET = 500_000_000  # gradients that are reduced at once: DeepSpeed's own


def prepare_deepspeed(backend: str, local_rank: int, device: torch.device) -> Any:
    """Imports DeepSpeed quietly and joins it to the process group that already exists.

    On a CPU its start would compile a shared-memory operator, which needs ninja and a C++ compiler and crashes where
    either is missing; the operator is declared incompatible instead, and Gloo does the work. Its engine imports the
    Muon optimizer to see that ours is not one, and that decorates three functions with torch.compile, for which torch
    loads its whole compiler: 1.5 s of each rank's start. They stay as they are written.

    Args:
        backend: `gloo` or `nccl`, the backend of the default process group.
        local_rank: this process's place on its node.
        device: of this rank. DeepSpeed makes the CUDA device of number LOCAL_RANK its own; Ray, and Slurm with one GPU
            a task, show each process one device alone, so that its number is 0 whatever the rank's place.

    Raises:
        ModuleNotFoundError: with what to install.
    """
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # it refuses a local rank that differs from Open MPI's
    os.environ["LOCAL_RANK"] = str(device.index or 0 if device.type == "cuda" else local_rank)
    os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    try:
        import deepspeed
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "ZeRO needs DeepSpeed: run `make setup`, or use --launcher debug, which does without"
        ) from missing
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith("DeepSpeed") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.WARNING)
    from deepspeed import ops

    for key in [key for key in ops.__compatible_ops__ if "shm" in key]:
        ops.__compatible_ops__[key] = False
    from deepspeed.runtime import compiler

    compiler.compile = lambda: compiler.dummy_decorator  # DeepSpeed's own, for a torch that cannot compile
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def deepspeed_config(
    stage: int, precision: str, micro_batch_size: int, accumulation_steps: int, world_size: int, backend: str
) -> dict[str, Any]:
    """DeepSpeed's JSON, generated from our configuration; written to the run's folder, never edited by hand."""
    zero: dict[str, Any] = {"stage": stage}
    # A second buffer of gradients to fill while the first is reduced; one rank reduces nothing.
    overlap = backend == "nccl" and world_size > 1
    if stage in (1, 2):
        # Gloo has no asynchronous streams to hide a reduction behind. Without contiguous gradients stage 1 reduces
        # expert gradients wrongly and says nothing (0.19.8, ep 2: losses off by 1e-4 after five steps).
        zero |= {"overlap_comm": overlap, "contiguous_gradients": True}
    if stage == 3:
        zero |= {"overlap_comm": overlap, "stage3_gather_16bit_weights_on_model_save": False}
    # Sums of gradients, over micro-steps and ranks, in fp32: in bf16 a sum of 144 is off by 1 %, and of gradients that
    # all point one way 1,024 lose half, since what is less than half of a last place is not added.
    sums = {}
    if precision == "bf16":
        sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return {
        **sums,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**12,
        "zero_optimization": zero,
        # A step that is not finite is skipped; this has not been DeepSpeed's default in every version.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
    }


@contextmanager
def _zero_in_every_stage() -> Iterator[None]:
    """Inside, DeepSpeed takes its ZeRO optimizer for bf16 with fp32 sums in stage 1 too.

    By itself it takes another one there (`BF16_Optimizer`, 0.19.8), which shards and names its state otherwise; that of
    stages 1 and 2 can do the same (`use_grad_accum_attribute`).
    """
    from deepspeed.runtime import engine

    choose = engine.DeepSpeedEngine._do_optimizer_sanity_check

    def zero(self: Any, optimizer: Any) -> Any:
        chosen = choose(self, optimizer)
        return engine.ZERO_OPTIMIZATION if chosen == engine.BFLOAT16 else chosen

    engine.DeepSpeedEngine._do_optimizer_sanity_check = zero
    try:
        yield
    finally:
        engine.DeepSpeedEngine._do_optimizer_sanity_check = choose


class _Marked(nn.Module):
    """The model beside the empty layer that makes DeepSpeed treat expert parameters as experts."""

    def __init__(self, model: nn.Module, marker: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.marker = marker

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def _marker(stage: int, layout: Layout, n_experts: int) -> nn.Module:
    """An empty layer of the class that DeepSpeed looks for, whose only deed is to register the groups."""
    from deepspeed.utils import groups

    if stage == 3:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer as Base
    else:
        from deepspeed.moe.layer import MoE as Base

    class ExpertMarker(Base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = n_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            groups._create_expert_and_data_parallel(layout.ep_size)

    return ExpertMarker()


def _mark_experts(module: nn.Module, layout: Layout) -> bool:
    """Tells DeepSpeed which parameters are experts; returns whether there are any that are not on every rank."""
    if layout.ep_size == 1:
        return False  # every rank holds all experts: to ZeRO they are parameters like any other
    group_name = f"ep_size_{layout.ep_size}"
    found = False
    for name, parameter in module.named_parameters():
        if is_expert(name):
            found = True
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = group_name  # type: ignore[attr-defined]
    return found


class ZeroEngine:
    """The `parallel.engine.Engine` protocol on DeepSpeed.

    Args:
        module: the local model, fp32, initialised.
        config: AdamW's settings.
        layout: this rank's place.
        stage: ZeRO stage, 0 to 3.
        n_experts: routed experts in all.
        precision: `fp32` or `bf16` (working weights in bf16, fp32 masters in the optimizer; stages 1 to 3).
        micro_batch_size: sequences per rank and micro-step. accumulation_steps: micro-steps per optimizer step.
        device: where this rank computes. local_rank: its place on the node.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        layout: Layout,
        *,
        stage: int,
        n_experts: int,
        precision: str,
        micro_batch_size: int,
        accumulation_steps: int,
        device: torch.device,
        local_rank: int,
    ) -> None:
        backend = dist.get_backend()
        deepspeed = prepare_deepspeed(backend, local_rank, device)
        self.module = module
        self.config = config
        self.layout = layout
        self.stage = stage
        self.device = device
        self.optimizer_steps = 0
        self._norm = 0.0
        self._skip = False
        self.waits = Waits() if device.type == "cuda" else count_waits(deepspeed.comm.comm.cdb)
        spread = _mark_experts(module, layout)
        marked = _Marked(module, _marker(stage, layout, n_experts) if spread else None)
        param_groups = parameter_groups(module, config.weight_decay)
        if spread:
            from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

            param_groups = split_params_into_different_moe_groups_for_optimizer(param_groups)
            param_groups = [group for group in param_groups if group["params"]]
        adamw = torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.settings = deepspeed_config(
            stage, precision, micro_batch_size, accumulation_steps, layout.world_size, backend
        )
        if stage > 0:  # DeepSpeed clips with the norm that `_install_norm` gives it
            self.settings["gradient_clipping"] = config.grad_clip
            # Its buffer of gradients is made anew in each step. Of the size that it has by default, 2 GB, every page is
            # fetched from the system each time: 5,000 faults for 5 million parameters, 50 ms of a step's 820.
            n_gradients = sum(parameter.numel() for parameter in module.parameters())
            self.settings["zero_optimization"]["reduce_bucket_size"] = min(_MOST_IN_BUCKET, max(1, n_gradients))
        with _zero_in_every_stage():
            self._engine, *_ = deepspeed.initialize(
                model=marked, optimizer=adamw, config=self.settings, dist_init_required=False
            )
        self._zero = self._engine.optimizer
        self._adamw = adamw
        for flat in self._flat_masters():
            adamw.state[flat] = fresh_moments(flat.data, 0)
        self._install_norm()

    # -- the step ---------------------------------------------------------------------------------------------------

    def forward(self, **inputs: Any) -> Any:
        """Runs the model under DeepSpeed's hooks."""
        return self._engine(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over ranks; the factor turns that into the sum which `loss` is a share of."""
        self._engine.backward(loss * self.layout.world_size, scale_wrt_gas=False)
        if last:
            self._norm = self._global_norm()
        else:
            self._engine.step()  # only counts the micro-step

    def grad_norm(self) -> float:
        """The norm found by the last `backward`."""
        return self._norm

    def step(self, lr: float) -> None:
        """Clips, applies AdamW at `lr` to this rank's share, gathers the new weights."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self.stage == 0 and self.config.grad_clip > 0 and self._norm > self.config.grad_clip:
            for gradient in self._gradients():
                gradient.mul_(self.config.grad_clip / self._norm)
        self._engine.step()
        self.optimizer_steps += 1

    def skip(self) -> None:
        """Leaves weights and moments alone: by DeepSpeed's own way out of a norm that is not finite."""
        if self.stage == 0:
            self._engine.module.zero_grad(set_to_none=True)
            self._engine.step()
            return
        self._skip = True
        self._engine.step()
        self._skip = False

    def close(self) -> None:
        """Takes DeepSpeed's hooks and buffers off the model; the engine cannot be used afterwards."""
        self._engine.destroy()

    def _gradients(self) -> Iterator[Tensor]:
        """The reduced gradients that this rank holds; in stages 1 to 3 no element is held twice."""
        if self.stage == 0:
            yield from (parameter.grad for parameter in self.module.parameters() if parameter.grad is not None)
            return
        for gradients in self._zero.averaged_gradients.values():
            if gradients is not None:
                yield from (gradient for gradient in gradients if gradient is not None)

    def _global_norm(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.stage == 0:
            for name, parameter in self.module.named_parameters():
                copies = self.layout.edp_size if is_expert(name) else self.layout.world_size
                if parameter.grad is not None:
                    total += parameter.grad.double().square().sum() / copies
        else:
            for gradient in self._gradients():
                total += gradient.double().square().sum()
        if self.device.type == "cuda":
            dist.all_reduce(total)
        else:
            self.waits.during(dist.all_reduce, total)
        return float(total.sqrt())

    def _install_norm(self) -> None:
        """Gives DeepSpeed the true norm to clip with, and infinity when the step is to be skipped."""
        if self.stage == 0:
            return

        def norm(*_: Any, **__: Any) -> Tensor:
            return torch.tensor(float("inf") if self._skip else self._norm, dtype=torch.float32, device=self.device)

        if self.stage == 3:
            self._zero._get_norm_groups = lambda: [norm()]
        else:
            self._zero.scaled_global_norm = norm

    # -- the state --------------------------------------------------------------------------------------------------

    def _flat_masters(self) -> list[Tensor]:
        """The tensors that AdamW really updates: parameters in stage 0, flat fp32 partitions of this rank above."""
        if self.stage == 0:
            return list(self.module.parameters())
        if self.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def state_shards(self) -> Iterator[StateShard]:
        """See `Engine.state_shards`."""
        for name, parameter in self.module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if self.stage == 0:
                holders, mine = (
                    (self.layout.edp_size, self.layout.edp_rank)
                    if is_expert(name)
                    else (self.layout.world_size, self.layout.rank)
                )
                start, stop = slice_bounds(parameter.numel(), holders, mine)
            elif self.stage == 3:
                cut: Any = parameter  # DeepSpeed has given it attributes of its own
                size = cut.partition_numel()
                start = size * getattr(cut, "ds_zero_partition_rank", self.layout.rank)
                stop = min(start + size, cut.ds_numel)
            else:
                mapping = getattr(parameter, "_hp_mapping", None)
                if mapping is None:
                    continue  # this rank's partition holds nothing of it
                start = mapping.lp_fragment_address.start
                stop = start + mapping.lp_fragment_address.numel
            if stop > start:
                for kind in KINDS:
                    yield StateShard(name, shape, kind, start, self._values(parameter, kind, start, stop))

    def _values(self, parameter: nn.Parameter, kind: str, start: int, stop: int) -> Tensor:
        """A view of the live state of elements [start, stop) of a parameter."""
        if self.stage == 0:
            whole = parameter.data if kind == "weight" else self._adamw.state[parameter][kind]
            return whole.view(-1)[start:stop]
        if self.stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
        else:
            address = parameter._hp_mapping.hp_fragment_address  # type: ignore[attr-defined]
            offset = address.start
            flat = next(
                master
                for master, params in zip(
                    self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True
                )
                if any(parameter is one for one in params)
            )
        whole = flat.data if kind == "weight" else self._adamw.state[flat][kind]
        return whole.narrow(0, offset, stop - start)

    def load_state(self, read: Callable[[StateShard], Tensor], optimizer_steps: int) -> None:
        """Fills this rank's share, then lets DeepSpeed rebuild the working weights from the masters."""
        if self.stage == 0:
            for name, parameter in self.module.named_parameters():
                for kind in KINDS:
                    values = self._values(parameter, kind, 0, parameter.numel())
                    values.copy_(read(StateShard(name, tuple(parameter.shape), kind, 0, values)))
        else:
            for shard in self.state_shards():
                shard.values.copy_(read(shard))
        for flat in self._flat_masters():
            self._adamw.state[flat]["step"].fill_(float(optimizer_steps))
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            kept = self._zero.persistent_parameters  # small ones, which stay whole between steps
            if kept:
                kept[0].partition(kept)  # a parameter that is already whole would not be gathered again
                kept[0].all_gather(kept)
        self.optimizer_steps = optimizer_steps
