"""Known mistakes in balancing, made in a copy of the code: the exactness contract has to catch each one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.ranks.spawn import ROOT

PACKAGES = ("cluster", "data", "kernels", "launch", "model", "parallel", "tests")


Edit = tuple[str, str, str]  # file, text that stands in it once, what it becomes


class Mistake(NamedTuple):
    """edits: what makes it. caught: a part of what the contract says of it."""

    edits: tuple[Edit, ...]
    caught: str


BALANCE, RULES, ROUTER = "parallel/balance.py", "parallel/balance_rules.py", "model/router.py"
SESSION, TRAIN = "launch/session.py", "launch/train.py"

COUNTS = "self._counts = torch.zeros((len(self.biases), n_experts), dtype=torch.int64)"
TAKEN = "counts, self._counts = self._counts, torch.zeros_like(self._counts)\n"
NEEDS = "needs, self._needs = self._needs, None"
REDUCED = "None if needs is None else self.communicator.all_reduce(needs)"
ADDED = "            balancer.add(output.routing)\n"
RETURNED = "        return (topk_ids, topk_weights, *stats)\n"
BALANCER = "    balancer = Balancer(list(biases.values()), config.balance, ranks.dp)\n"
SHORTFALL = "    shortfall = counts.sum(-1, keepdim=True) - counts * counts.shape[-1]\n"


def counted_as(dtype: str) -> tuple[Edit, ...]:
    """Adds up in a floating-point dtype; what comes of it is an integer again."""
    return (
        (BALANCE, COUNTS, COUNTS.replace("int64", dtype)),
        (BALANCE, TAKEN, TAKEN.replace("= self._counts,", "= self._counts.long(),")),
    )


def counted_in_forward(condition: str) -> tuple[Edit, ...]:
    """Counts in a buffer to which every forward adds if `condition`; the balancer reads and clears it."""
    owner = "        self.config = config\n        experts = config.n_routed_experts\n"
    gates = 'model.get_submodule(f"{path}.mlp.gate").counted for path in config.model.moe_layers'
    read = """        for row, counter in enumerate(getattr(self, "counters", ())):
            counts[row] = counter
            counter.zero_()
"""
    return (
        (ROUTER, owner, f"{owner}        self.counted = torch.zeros(experts, dtype=torch.int64)\n"),
        (ROUTER, RETURNED, f"        if {condition}:\n            self.counted += counts.sum(0)\n{RETURNED}"),
        (SESSION, BALANCER, f"{BALANCER}    balancer.counters = [{gates}]\n"),
        (BALANCE, TAKEN, TAKEN + read),
    )


MISTAKES = {
    "counts in bf16": Mistake(counted_as("bfloat16"), "counts of step"),
    "counts in fp16": Mistake(counted_as("float16"), "large counts"),
    "a recomputed forward counts again": Mistake(counted_in_forward("memory"), "counts of step 0"),
    "evaluation counts": Mistake(counted_in_forward("not recomputed"), "counts of step 2"),  # the look back at a skip
    "each rank by its own counts": Mistake(
        ((BALANCE, f"self.communicator.all_reduce(counts), {REDUCED}", f"counts, {REDUCED}"),),
        "BiasMismatchError: ranks [0] and [1] hold different",
    ),
    "each rank by its own histogram": Mistake(
        ((BALANCE, REDUCED, "needs"),), "BiasMismatchError: ranks [0] and [1] hold different"
    ),
    "the bias in the weights": Mistake(
        (
            (
                ROUTER,
                "weigh(scores, topk_ids, config)\n",
                "weigh(scores + (0 if bias is None else bias), topk_ids, config)\n",
            ),
        ),
        "weights are not those of plain scores",
    ),
    "an update for each micro-step": Mistake(
        ((TRAIN, ADDED, ADDED + "            number or balancer.step(engine.optimizer_steps)\n"),), "counts of step 0"
    ),
    "the sign turned round": Mistake(((RULES, "torch.sign(", "torch.sign(-"),), "bias after step 0"),
    "the mean rounded": Mistake(
        ((RULES, SHORTFALL, SHORTFALL.replace(" - counts * counts.shape[-1]", " // counts.shape[-1] - counts")),),
        "large counts",
    ),
    "a skipped step's counts are kept": Mistake(
        ((BALANCE, "return self._take()[0]", "return self.communicator.all_reduce(self._counts.clone())"),),
        "counts of step 2",
    ),
    "a skipped step moves the bias": Mistake(
        ((TRAIN, "balancer.skip(), 0.0", "balancer.step(engine.optimizer_steps), 0.0"),), "step 1, which was skipped"
    ),
    "a skipped step's histogram is kept": Mistake(
        ((BALANCE, NEEDS, "needs = None if self._needs is None else self._needs.clone()"),), "bias after step"
    ),
    "skipped steps advance the schedule": Mistake(
        ((TRAIN, "balancer.step(engine.optimizer_steps)  #", "balancer.step(step)  #"),), "bias after step 2"
    ),
    "the bias in bf16": Mistake(((BALANCE, "copy_(row)", "copy_(row.bfloat16())"),), "bias after step 0"),
    "a resume forgets the bias": Mistake(
        (("parallel/checkpoint.py", "        bias.copy_(reader.read(", "        bias.clone().copy_(reader.read("),),
        "counts of step 4",
    ),
    "a resume forgets the raised rate": Mistake(
        ((SESSION, 'self.balancer.load_state(manifest.get("balancer", {}))', "pass"),), "rate of step 4"
    ),
    "a resume forgets the alarms": Mistake(
        ((SESSION, 'self.alarms.load_state(manifest.get("alarms", {}))', "pass"),), "rate of step 6"
    ),
    "a recomputed forward chooses anew": Mistake(
        ((ROUTER, "        if topk_ids is None:\n", "        if True:\n"),), "another choice than the first"
    ),
    "the balance loss sees one micro-step": Mistake(
        ((TRAIN, "        if self._wanted and len(batches) > 1:\n", "        if False:\n"),), "norm of step 0"
    ),
}


def tree(folder: Path, edits: tuple[Edit, ...]) -> str:
    """The code with some texts replaced; packages without an edit are links."""
    folder.mkdir()
    for package in PACKAGES:
        if any(name.startswith(f"{package}/") for name, *_ in edits):
            shutil.copytree(ROOT / package, folder / package)  # with what is compiled, which saves most of the import
        else:
            (folder / package).symlink_to(ROOT / package)
    for name, old, new in edits:
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name} holds this {text.count(old)} times, the mistake needs it once: {old!r}"
        (folder / name).write_text(text.replace(old, new))
    return str(folder)


@pytest.fixture(scope="module")
def verdicts(contract_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the contract says of every copy; all in one process."""
    folder = tmp_path_factory.mktemp("mistakes")
    trees = {"none": tree(folder / "none", ())}
    for number, (name, mistake) in enumerate(MISTAKES.items()):
        trees[name] = tree(folder / str(number), mistake.edits)
    payload = json.dumps({"data": str(contract_data), "trees": trees})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests/ranks/mutants.py"), payload],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_code_as_it_is_keeps_the_contract(verdicts: dict[str, str]) -> None:
    assert verdicts["none"] == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_known_mistake_is_caught(verdicts: dict[str, str], name: str) -> None:
    assert MISTAKES[name].caught in verdicts[name], f"{name}: {verdicts[name] or 'not caught'}"
