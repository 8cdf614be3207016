"""How a resumed run goes on: in which order of the data, with which learning rate, and what of it has to be told."""

from typing import TYPE_CHECKING, Any

from data.batches import Batches
from data.errors import DataError
from data.orders import NAME, go_on, record, recorded
from data.stream import Stream
from launch.config import from_tables
from parallel.schedule import rate_jump

if TYPE_CHECKING:
    from launch.session import Session


def take_up_data(session: "Session", cursor: dict[str, Any], accepted: list[str], orders_before: int | None) -> None:
    """Goes on in the data from a checkpoint's cursor, and tells what is another than it was; collective.

    A changed order must have been accepted: by key, as long as this launch has not recorded one, or as the last order
    that was recorded, which a start that fell back to an older checkpoint takes up again.

    Args:
        accepted: keys or sections of the configuration. orders_before: lines of orders.jsonl when the launch began,
            None where nobody counted them.

    Raises:
        DataError: the data is not the saved run's, and that was not accepted. On every rank.
    """
    stream, feed = session.stream, session.feed
    if not isinstance(stream, Stream) or feed.dataset is None:
        stream.check_cursor(cursor)
        return
    config = session.config
    order = go_on(feed.dataset, config.data, config.train.global_batch_size, cursor)
    step = int(cursor["next_step"])
    if order.changed and not _allowed(session, order.keys, accepted, orders_before):
        raise DataError(
            f"the data is not what the checkpoint of step {step} was trained on: {'; '.join(order.changed)}; give "
            f"that back, or accept it once with {' '.join(f'--accept-change {names[0]}' for names in order.keys)}"
        )
    stream.use(order.batches, step, order.plan)
    if not order.changed or order.exact:
        stream.continue_from(cursor)
    if order.resized is not None:
        old, new = order.resized
        cause = f"the global batch size goes from {old} to {new} at step {step + 1}: "
        cause += _GOES_ON if order.exact else "with the order of the data, which is another one too"
        session.telemetry.event("change", cause=cause, step=step)
    if order.changed:
        what = "; ".join(order.changed)
        cause = f"{what}: {_GOES_ON}" if order.exact else f"another order of the data: {what}. {_begins_anew(cursor)}"
        session.telemetry.event("change", cause=cause, step=step)
    if order.changed or order.resized:
        session.guard.afresh()
    record_order(session, step, order.exact if order.changed else True)


_GOES_ON = "the order of the data goes on where it was, nothing is left out or repeated"


def _begins_anew(cursor: dict[str, Any]) -> str:
    ranges = len(cursor["skip_ranges"])
    left = f", {ranges} ranges that the guard left out among them" if ranges else ""
    return (
        f"It begins at its first sequence: nothing says which of its text the {cursor['next_sequence']} sequences "
        f"before were made of{left}, so it may be read again; `trimtab data audit` proves each order by itself"
    )


def record_order(session: "Session", step: int, exact: bool) -> None:
    """Notes in orders.jsonl which order the run follows behind `step` steps, if the last line does not say so."""
    stream = session.stream
    if session.ranks.dp.rank != 0 or not isinstance(stream, Stream):
        return
    path, digest = session.run.path / NAME, stream.plan.digest()
    found = recorded(path)
    if found and found[-1].plan == digest and found[-1].step <= step:
        return
    config = session.config
    session.run.orders.append(record(stream.plan, config.data, step, exact, config.train.global_batch_size))


def _allowed(
    session: "Session", keys: tuple[tuple[str, ...], ...], accepted: list[str], orders_before: int | None
) -> bool:
    """Whether a changed order may be taken; rank 0 looks, for all."""
    found = recorded(session.run.path / NAME) if session.ranks.dp.rank == 0 else []
    known = bool(found) and found[-1].same_settings(session.config.data, session.feed.fingerprint)
    by_key = all({"data", *names} & set(accepted) for names in keys)
    now = by_key and (orders_before is None or len(found) == orders_before)
    return bool(session.ranks.dp.gather(known or now)[0])


def leave_out(session: "Session", skipping: Batches, step: int) -> None:
    """Goes on from an older checkpoint, after `step` steps, without some of the sequences.

    The checkpoint may be older than the batch size or the order of the data that the run has now: that holds from the
    checkpoint on then.

    Args:
        skipping: the batches so far with the ranges that are left out.
    """
    assert isinstance(session.stream, Stream)
    size, exact = session.config.train.global_batch_size, True
    if step < skipping.begins:
        skipping, exact = Batches(Batches.beginning(step, size).phases, skipping.skip_ranges, step), False
    elif skipping.size(step) != size:
        skipping = skipping.then(step, size)
    session.stream.use(skipping, step)
    record_order(session, step, exact)


def tell_rate(session: "Session", manifest: dict[str, Any]) -> None:
    """Tells when the learning rate jumps at a resume, and lets the guard's comparisons begin afresh there."""
    try:
        before = from_tables(manifest["config"])
    except (KeyError, ValueError):  # of an older version
        return
    now, step = session.config, session.engine.optimizer_steps
    jump = rate_jump((before.optimizer, before.train.steps), (now.optimizer, now.train.steps), step)
    if jump is not None:
        session.telemetry.event(
            "change", cause=f"the rate goes from {jump[0]:.6g} to {jump[1]:.6g} at step {manifest['step'] + 1}, by the "
            "settings of optimizer and train.steps as they are now", step=manifest["step"],
            key="learning rate", old=jump[0], new=jump[1],
        )  # fmt: skip
        session.guard.afresh()
