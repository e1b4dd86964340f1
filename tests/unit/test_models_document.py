"""docs/models.md says what the table and the tests' results say."""

from __future__ import annotations

from pathlib import Path

import transformers
from tiny_families import DISCOVERED, FAMILIES

from fiddlerc.frontend.architectures import ARCHITECTURES
from tests import models_document


def test_the_document_is_as_generated() -> None:
    assert Path(models_document.DOCUMENT).read_text() == models_document.render(), "make models"


def test_every_family_of_the_table_is_tested_and_passes_on_all_lanes() -> None:
    assert [row.model_type for row in ARCHITECTURES] == list(FAMILIES)
    assert {name: models_document.status(name) for name in (*FAMILIES, *DISCOVERED)} == dict.fromkeys(
        (*FAMILIES, *DISCOVERED), "all lanes"
    )


def test_the_document_names_the_transformers_that_was_used() -> None:
    assert transformers.__version__.startswith(models_document.TRANSFORMERS)
