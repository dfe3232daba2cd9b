"""Drafts: what a run that died while it replaced an output has left is mended."""

import os

import pytest

from dfpir.drafts import Draft, copy_folder, recover


def folder(path, content):
    path.mkdir(parents=True)
    (path / "content.txt").write_text(content)


def shown(path):
    return (path / "content.txt").read_text()


def listed(place):
    return sorted(path.name for path in place.iterdir())


def draft_of(output, key="0123456789abcdef0123"):
    draft = Draft(output, key)
    draft.open()
    return draft


def test_a_draft_becomes_the_output_and_others_go(tmp_path):
    output = tmp_path / "out"
    folder(output, "old")
    other = draft_of(output, "f" * 20)
    other.finish("1")
    draft = draft_of(output)
    folder(draft.content, "new")
    draft.publish(overwrite=True)
    assert shown(output) == "new" and listed(tmp_path) == ["out"]


def test_an_output_that_appeared_meanwhile_stays(tmp_path):
    draft = draft_of(tmp_path / "out")
    folder(draft.content, "new")
    folder(tmp_path / "out", "other")
    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        draft.publish(overwrite=False)
    assert shown(tmp_path / "out") == "other" and shown(draft.content) == "new"


def test_an_output_that_was_moved_away_comes_back(tmp_path):
    """The process died between the two moves."""
    folder(tmp_path / ".out.old", "old")
    recover(tmp_path / "out")
    assert shown(tmp_path / "out") == "old" and listed(tmp_path) == ["out"]


def test_what_was_replaced_does_not_come_back(tmp_path):
    """The process died after the two moves, or while it removed the old output."""
    folder(tmp_path / "out", "new")
    folder(tmp_path / ".out.old", "old")
    folder(tmp_path / ".out.old.waste", "half")
    recover(tmp_path / "out")
    assert shown(tmp_path / "out") == "new" and listed(tmp_path) == ["out"]


def test_a_failed_move_brings_the_old_output_back(tmp_path):
    folder(tmp_path / "out", "old")
    draft = draft_of(tmp_path / "out")  # without content, so that the second move fails
    with pytest.raises(FileNotFoundError):
        draft.publish(overwrite=True)
    assert shown(tmp_path / "out") == "old"


def test_finished_parts_are_taken_over_but_a_torn_name_is_not(tmp_path):
    draft = draft_of(tmp_path / "out")
    folder(draft.content, "new")
    draft.finish("0 1")
    draft.finish("0 2")
    with draft.list.open("a") as file:
        file.write("0 1")
    again = draft_of(tmp_path / "out")
    assert again.finished == {"0 1", "0 2"}
    again.finish("0 10")
    assert draft_of(tmp_path / "out").finished == {"0 1", "0 2", "0 10"}
    assert draft_of(tmp_path / "out", "f" * 20).finished == set()


def test_a_list_without_content_is_of_no_use(tmp_path):
    draft = draft_of(tmp_path / "out")
    draft.finish("0 1")
    assert draft_of(tmp_path / "out").finished == set()


def test_a_copy_of_what_is_protected_can_be_written_to(tmp_path):
    folder(tmp_path / "source" / "inner", "kept")
    folder(tmp_path / "source" / "other", "left out")
    for path in (tmp_path / "source" / "inner" / "content.txt", tmp_path / "source" / "inner"):
        path.chmod(0o555)
    copy_folder(tmp_path / "source", tmp_path / "copy", {tmp_path / "source" / "other"})
    assert listed(tmp_path / "copy") == ["inner"]
    assert shown(tmp_path / "copy" / "inner") == "kept"
    for path in (tmp_path / "copy").rglob("*"):
        assert path.stat().st_mode & 0o200
    (tmp_path / "source" / "inner").chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make symbolic links")
def test_what_cannot_be_copied_is_named_in_one_line(tmp_path):
    folder(tmp_path / "source", "kept")
    for name in ("one", "other"):
        (tmp_path / "source" / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="cannot be copied to the output") as caught:
        copy_folder(tmp_path / "source", tmp_path / "copy")
    message = str(caught.value)
    assert "(nor can 1 more): " in message
    assert "\n" not in message and "), (" not in message
