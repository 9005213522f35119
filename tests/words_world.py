"""The moving-words world with an untrained pipeline and untrained readers, small enough for tests; it draws and reads nothing that means anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from pretrain.moving_digits import pipeline_writer, portable_names
from pretrain.vae import build_vae
from pretrain.words import build_words_encoder, build_words_tokenizer

from instep.bundled import _ENTRIES, MOVING_WORDS, WORLDS, moving_words, word_readers, words_evaluation
from instep.bundled.word_networks import ARCHITECTURES
from instep.bundled.word_readers import ReaderMonitor, ReaderName, WordReader


def write_pipeline(folder: Path) -> None:
    """A Wan pipeline of the world's shapes with one layer of width 16."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=32,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = build_vae(base=2, patch=None)
    pipeline_writer(folder, vae, build_words_tokenizer(), build_words_encoder(0), 3.0)(transformer)
    vae.half().save_pretrained(folder / "vae")
    portable_names(folder)


def register(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts a world in `folder` in the list of bundled worlds, its evaluation cut to a few prompts, until the test ends; PP-OCR is not there."""
    torch.manual_seed(1)
    readers = {name: WordReader(name, net(), {"word": 0.0}) for name, net in ARCHITECTURES.items()}

    def reader(which: ReaderName) -> WordReader:
        return readers[which]

    monkeypatch.setattr(word_readers, "reader", reader)
    monkeypatch.setattr(word_readers, "monitor", lambda: ReaderMonitor(reader("monitor"), open_copies=2))
    monkeypatch.setattr(words_evaluation, "PROMPTS", {"quick": (6, 2, 4), "full": (8, 2, 4)})
    monkeypatch.setattr(words_evaluation, "REFERENCE_DRAWS", 1)
    monkeypatch.setattr(
        moving_words, "WordsEvaluation", lambda: words_evaluation.WordsEvaluation(reader=reader, outside=lambda: None, has_outside=lambda: False)
    )
    monkeypatch.setattr(moving_words, "MOVING_WORDS_WORLD", moving_words.words_world(folder))
    monkeypatch.setitem(WORLDS, MOVING_WORDS, _ENTRIES[MOVING_WORDS])
