"""A thin TensorBoard writer: one event a step with all its scalars, images, histograms and text.

It writes through tensorboard's own event file writer, whose thread flushes every few seconds. One event a step, where
torch.utils.tensorboard writes one a figure, takes 0.1 ms for 40 figures instead of 1.0 ms. Without the tensorboard
package the writer says so once and does nothing, as the debug mode needs torch and numpy alone.
"""

import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.redact import redact


def png_bytes(image: np.ndarray) -> bytes:
    """An RGB image, (height, width, 3) uint8, as a PNG file."""
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each row is led by its filter type, 0 = none
    rows[:, 1:] = image.reshape(height, 3 * width)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, colour type 2 = RGB
    pixels = chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def how_to_view(run: str | Path) -> str:
    """The command that shows a run's figures, with those of the runs beside it, each under its name; on this machine
    only: TensorBoard asks nobody for a password."""
    return f"tensorboard --logdir {Path(run).parent} --host 127.0.0.1"


class TensorBoard:
    """Writes one run's figures into ``log_dir``; every method takes the step it belongs to.

    Args:
        log_dir: the folder; each start of a run adds one file to it.
        flush_s: seconds after which what was written is on disk at the latest.
        say: called with one line when figures cannot be written; training goes on without them.
        open_file: False makes a writer that does nothing and says nothing.
    """

    def __init__(
        self, log_dir: str | Path, *, flush_s: float = 5.0, say: Callable[[str], None] = print, open_file: bool = True
    ):
        self.log_dir = Path(log_dir)
        self._say = say
        self._writer: Any = None
        if not open_file:
            return
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as missing:
            say(f"no TensorBoard figures: {missing} (pip install tensorboard); metrics.jsonl holds the same figures")
            return
        self._event, self._summary, self._tensor = event_pb2, summary_pb2, tensor_pb2
        self._open = lambda folder: EventFileWriter(str(folder), flush_secs=flush_s)
        self._attempt(self._open_main)

    @property
    def available(self) -> bool:
        """Whether figures are being written."""
        return self._writer is not None

    def purge(self, step: int) -> None:
        """Tells TensorBoard to forget what earlier files hold of ``step`` and later (a resume or roll-back)."""
        if self._writer is not None:
            log = self._event.SessionLog(status=self._event.SessionLog.START)
            self._add(self._event.Event(wall_time=time.time(), step=step, session_log=log))

    def scalars(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Writes ``{tag: value}`` of one step; None is left out."""
        values = [(tag, float(value)) for tag, value in figures.items() if value is not None]
        if self._writer is not None and values:
            one = self._summary.Summary.Value
            self._add_values(step, [one(tag=tag, simple_value=value) for tag, value in values])

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Lays out the Custom Scalars tab: heading -> chart -> regular expressions of the tags drawn together."""
        if self._writer is None:
            return
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata

        categories = [
            layout_pb2.Category(
                title=heading,
                chart=[layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                       for title, tags in drawn.items()],
            )
            for heading, drawn in charts.items()
        ]  # fmt: skip
        content = layout_pb2.Layout(category=categories).SerializeToString()
        self._add_string(0, metadata.CONFIG_SUMMARY_TAG, content, metadata.PLUGIN_NAME, ())

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Writes an RGB image, (height, width, 3) uint8."""
        if self._writer is not None:
            image = self._summary.Summary.Image(
                height=pixels.shape[0], width=pixels.shape[1], colorspace=3, encoded_image_string=png_bytes(pixels)
            )
            self._add_values(step, [self._summary.Summary.Value(tag=tag, image=image)])

    def histogram(self, step: int, tag: str, values: np.ndarray, bins: int = 30) -> None:
        """Writes the distribution of the finite values of an array of any shape."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if self._writer is not None and flat.size:
            counts, edges = np.histogram(flat, bins=bins)
            histogram = self._summary.HistogramProto(
                min=flat.min(), max=flat.max(), num=flat.size, sum=flat.sum(), sum_squares=(flat**2).sum(),
                bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
            )  # fmt: skip
            self._add_values(step, [self._summary.Summary.Value(tag=tag, histo=histogram)])

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Writes a text, shown as Markdown under TensorBoard's Text tab."""
        if self._writer is not None:
            self._add_string(step, tag, redact(markdown).encode(), "text", (1,))

    def flush(self) -> None:
        if self._writer is not None:
            self._attempt(self._writer.flush)

    def close(self) -> None:
        if self._writer is not None:
            self._attempt(self._writer.close)
            self._writer = None

    def _open_main(self) -> None:
        self._writer = self._open(self.log_dir)

    def _add_string(self, step: int, tag: str, content: bytes, plugin: str, shape: Sequence[int]) -> None:
        plugin_data = self._summary.SummaryMetadata.PluginData(plugin_name=plugin)
        tensor = self._tensor.TensorProto(dtype="DT_STRING", string_val=[content])
        for size in shape:
            tensor.tensor_shape.dim.add(size=size)
        metadata = self._summary.SummaryMetadata(plugin_data=plugin_data)
        value = self._summary.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
        self._add_values(step, [value])

    def _add_values(self, step: int, values: list[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._add(self._event.Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Any) -> None:
        self._attempt(lambda: self._writer.add_event(event))

    def _attempt(self, write: Callable[[], None]) -> None:
        """A full disk ends the figures, not the training: metrics.jsonl has them too, and its writer does raise."""
        try:
            write()
        except OSError as error:
            self._writer = None
            self._say(f"TensorBoard figures end here: {error} ({self.log_dir}); metrics.jsonl goes on")
