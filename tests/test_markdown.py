"""Tables put into documents."""

import pytest

from dfpir.markdown import fill, filled

DOCUMENT = "above\n<!-- scores -->\n| former |\n<!-- /scores -->\nbelow\n"


def test_a_document_is_filled_between_its_marks_and_again():
    once = filled(DOCUMENT, "scores", "| set |\n| new |")
    assert once == "above\n<!-- scores -->\n| set |\n| new |\n<!-- /scores -->\nbelow\n"
    assert filled(once, "scores", "| set |\n| new |") == once


@pytest.mark.parametrize("document", ["nothing", "<!-- /scores -->\n<!-- scores -->", DOCUMENT])
def test_a_document_without_the_marks_is_refused(document):
    name = "speed" if document is DOCUMENT else "scores"
    with pytest.raises(ValueError, match=f"has no lines <!-- {name} --> and <!-- /{name} -->"):
        filled(document, name, "text")


def test_a_file_is_filled_in_place(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    fill(path, "scores", "ü")
    assert path.read_text(encoding="utf-8") == filled(DOCUMENT, "scores", "ü")
