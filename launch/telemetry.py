"""One record a step: derives the balance figures and writes metrics.jsonl, TensorBoard and the console from it.

Used by rank 0 alone; the same calls on another rank (``main=False``) do nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch import balance_stats
from launch.accounting import Running, read_account
from launch.alarms import Alarm
from launch.charts import chart_layout, scalar_tags, tag_part
from launch.console import Console, Mode
from launch.runfolder import RunFolder, process_clock
from launch.step_record import StepRecord, derive
from launch.tensorboard import TensorBoard

# Up to so many experts in all layers together, every record holds each expert's load and bias (about 20 bytes each);
# larger models (58 x 256 would be 300 kB a step) have them in every ``loads_every``-th record.
LOADS_EVERY_STEP_LIMIT = 2048
LAYERS_WITH_IMAGES = 8  # of large models, evenly spread over the depth
ALARM_LINES = 5  # of one step's alarms that the console shows; all are in events.jsonl


class Telemetry:
    """The one place where a run's figures and events go out.

    Args:
        run: the run's folder, created.
        config: the resolved configuration as nested mappings; its ``model`` section names the layers, and all of it is
            shown under TensorBoard's Text tab.
        console, tensorboard: where the figures are shown and drawn.
        main: whether this is rank 0.
        heatmap_every: steps between load heat maps and bias histograms in TensorBoard (and one at the first step).
        loads_every: steps between the records that hold every expert's load and bias; None is every step for models
            with up to 2048 routed experts over all layers, else ``heatmap_every``.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        console: Console,
        tensorboard: TensorBoard,
        main: bool = True,
        *,
        heatmap_every: int = 20,
        loads_every: int | None = None,
    ):
        self.run, self.console, self.tensorboard, self.main = run, console, tensorboard, main
        self._config = config
        self._heatmap_every, self._loads_every = heatmap_every, loads_every
        self._layer_names: list[str] | None = None
        self._running: Running | None = None
        if main:
            tensorboard.text(0, "configuration", config_markdown(config))

    @classmethod
    def open(
        cls,
        run: RunFolder,
        config: Mapping[str, Any],
        *,
        total_steps: int,
        main: bool,
        console_mode: Mode = "auto",
        heatmap_every: int = 20,
    ) -> "Telemetry":
        """Telemetry with its console and TensorBoard for a created run folder; off altogether where not ``main``."""
        console = Console(total_steps, mode=console_mode if main else "off")
        tensorboard = TensorBoard(run.tensorboard, say=console.note, open_file=main)
        return cls(run, config, console, tensorboard, main, heatmap_every=heatmap_every)

    def log_step(self, record: StepRecord) -> None:
        """Writes one step everywhere. Raises: OSError when metrics.jsonl cannot be written."""
        if not self.main:
            return
        first = self._layer_names is None
        counts = balance_stats.as_array(record.tokens_per_expert)
        if self._layer_names is None:
            self._layer_names = balance_stats.layer_names(self._config, counts.shape[0])
        every = self._loads_every or (1 if counts.size <= LOADS_EVERY_STEP_LIMIT else self._heatmap_every)
        clock = process_clock()
        figures = {**derive(record, with_loads=first or record.step % every == 0), **clock}
        self.run.metrics.append(figures)
        self.console.step(figures)
        if record.coactivation is not None and counts.size:
            self._show_pairs(record.step, balance_stats.as_array(record.coactivation), self._layer_names)
        if self.tensorboard.available:
            if first and counts.size:
                self.tensorboard.layout(chart_layout())
            self.tensorboard.scalars(record.step, scalar_tags(figures, self._layer_names))
            if self._running is not None:
                self.tensorboard.scalars(record.step, self._running.add(figures, clock["seconds"]))
            if counts.size and (first or record.step % self._heatmap_every == 0):
                self._draw(record, counts)

    def open_account(self, kind: str) -> None:
        """Takes stock of where the run's time went so far; from here on TensorBoard shows it step by step.

        Args:
            kind: what the time since the last record was, `starting` or `lost`.
        """
        if self.main and self.tensorboard.available:
            found = read_account(self.run)
            self._running = None if found is None else Running(found, process_clock()["seconds"], kind)

    def event(self, kind: str, *, cause: str, **fields: Any) -> None:
        """Writes one event to events.jsonl, and a line of it to the console; see ``RunFolder.event``."""
        if self.main:
            self.console.note(event_line(self.run.event(kind, cause=cause, **fields)))

    def note(self, text: str) -> None:
        """Shows a line on the console."""
        if self.main:
            self.console.note(text)

    def alarms(self, alarms: Sequence[Alarm]) -> None:
        """Writes each alarm of one step, or end of one, as an event; the console shows the first few."""
        if not self.main:
            return
        for number, alarm in enumerate(alarms):
            event = self.run.event("alarm", **alarm.fields())
            if number < ALARM_LINES:
                self.console.note(event_line(event))
        if len(alarms) > ALARM_LINES:
            self.console.note(
                f"and {len(alarms) - ALARM_LINES} more alarms at this step, all in {self.run.events_path}"
            )

    def evaluation(self, step: int, figures: Mapping[str, float], *, cause: str) -> None:
        """Writes figures of an evaluation after ``step`` as an event and under TensorBoard's ``evaluation`` heading."""
        if self.main:
            self.event("evaluation", cause=cause, step=step, **figures)
            self.tensorboard.scalars(step, {f"evaluation/{name}": value for name, value in figures.items()})

    def rewind(self, step: int, *, cause: str) -> None:
        """Goes on from ``step`` completed steps: later ones no longer count, in the files and in TensorBoard."""
        if self.main:
            dropped = self.run.rewind(step, cause=cause)
            self.tensorboard.purge(step + 1)
            if dropped:
                self.console.note(f"resuming from step {step}; {dropped} later steps are done again: {cause}")
            if self._running is not None:
                self.open_account("lost")

    def close(self) -> None:
        """Flushes and closes the files, and leaves the terminal in order."""
        if self.main:
            self.console.close()
            self.tensorboard.close()
            self.run.close()

    def _show_pairs(self, step: int, pairs: np.ndarray, layer_names: Sequence[str]) -> None:
        """Which experts are chosen together, (M, E, E) int64: coactivation.json, and images in TensorBoard."""
        from launch.heatmap import pairs_image, spread

        self.run.write_coactivation(step, layer_names, pairs)
        if self.tensorboard.available:
            for layer in spread(len(pairs), LAYERS_WITH_IMAGES):
                self.tensorboard.image(step, f"coactivation/{tag_part(layer_names[layer])}", pairs_image(pairs[layer]))

    def _draw(self, record: StepRecord, counts: np.ndarray) -> None:
        from launch.heatmap import load_image

        self.tensorboard.image(record.step, "balance/load_heat_map", load_image(counts, self._layer_names))
        if record.expert_bias is not None:
            bias = balance_stats.as_array(record.expert_bias)
            self.tensorboard.histogram(record.step, "balance/expert_bias", bias)


def event_line(event: Mapping[str, Any]) -> str:
    """An event as one line for people: ``save at step 100: every 100 steps (seconds_taken 0.4)``."""
    known: tuple[str, ...] = ("time", "seconds", "process", "kind", "cause", "step")
    if event["kind"] == "alarm":  # the cause says all of it
        known = tuple(event)
    if event["kind"] == "start":  # a line of its own and the report say these
        known += ("parameters", "active_parameters", "hardware", "versions", "commit", "date")
    rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in known and value is not None)
    at = f" at step {event['step']}" if "step" in event else ""
    return f"{event['kind']}{at}: {event['cause']}{f' ({rest})' if rest else ''}"


def config_markdown(config: Mapping[str, Any]) -> str:
    """The configuration as a Markdown table of dotted keys."""
    rows = [f"| `{key}` | {value} |" for key, value in dotted(config).items()]
    return "\n".join(["| key | value |", "|---|---|", *rows])


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys: ``{"model": {"hidden_size": 64}}`` is ``{"model.hidden_size": 64}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(dotted(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
