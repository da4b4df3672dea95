"""Calibration text: pieces of a text, or the model's own words."""

import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.calibrate import calibration_ids


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")


def test_pieces_of_a_text_do_not_overlap(stories):
    model, tokenizer = stories
    text = "Once upon a time, there was a little girl named Lily. She liked to play outside. " * 9
    ids = tokenizer.encode(text, add_special=False)
    found = calibration_ids(model, tokenizer, text, sequences=4, length=20)
    starts = np.linspace(0, len(ids) - 20, 4).astype(int)
    assert (np.diff(starts) >= 20).all() and starts[-1] + 20 == len(ids)
    np.testing.assert_array_equal(found, [ids[start : start + 20] for start in starts])
    with pytest.raises(ValueError, match=f"has {len(ids)} tokens, and 100 sequences of 20 need 2000"):
        calibration_ids(model, tokenizer, text, sequences=100, length=20)


def test_the_model_is_sampled_where_there_is_no_text(stories):
    model, _ = stories
    ask = {"sequences": 3, "length": 12}
    found = calibration_ids(model, None, **ask)
    assert found.shape == (3, 12)
    assert (found[:, 0] == model.config.bos_id).all()
    assert len({tuple(row) for row in found}) == 3
    np.testing.assert_array_equal(found, calibration_ids(model, None, **ask))
    assert (found != calibration_ids(model, None, seed=7, **ask)).any()


def test_bad_sizes_are_refused(stories):
    model, tokenizer = stories
    with pytest.raises(ValueError, match="length=513 at least 3 and at most the model's context of 512"):
        calibration_ids(model, tokenizer, "text", length=513)
    with pytest.raises(ValueError, match="a calibration text needs a tokenizer"):
        calibration_ids(model, None, "text")
