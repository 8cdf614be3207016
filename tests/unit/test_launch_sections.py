"""Where a rank says it is, and what is read of it afterwards."""

from pathlib import Path

from launch.around import in_section
from launch.sections import Sections, read_place
from model.exchange import LocalExchange


def test_the_last_mark_stays_and_other_generations_do_not_count(tmp_path: Path) -> None:
    assert str(read_place(tmp_path, 0)) == "section start"
    first, second = Sections(tmp_path, 0, generation=1), Sections(tmp_path, 1, generation=1)
    first.mark("a section with a very long name".replace(" ", "_"), 123456789)
    first.mark("start")
    second.mark("forward", 7)
    first.mark("backward", 6)
    place = read_place(tmp_path, 1, 0)
    assert (place.section, place.step) == ("backward", 6) and place.seen_at > 0
    assert read_place(tmp_path, 1).step == 7  # the one that came furthest
    assert (tmp_path / "rank-0.at").read_bytes().count(b"\n") == 1
    for rank in (0, None):
        assert read_place(tmp_path, 2, rank).is_starting and read_place(tmp_path, 0, rank).step is None
    (tmp_path / "rank-0.at").write_text("torn")
    assert read_place(tmp_path, 1, 0).step is None
    first.close()
    second.close()


def test_the_exchange_is_a_section_inside_another(tmp_path: Path) -> None:
    sections = Sections(tmp_path, 0)
    sections.mark("backward", 4)
    with sections.inside("exchange"):
        assert (read_place(tmp_path, 0, 0).section, read_place(tmp_path, 0, 0).step) == ("exchange", 4)
    assert (read_place(tmp_path, 0, 0).section, read_place(tmp_path, 0, 0).step) == ("backward", 4)
    sections.close()
    alone = LocalExchange()
    assert in_section(alone, sections) is alone
