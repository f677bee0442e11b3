"""Symbols to bytes and back: range coding with integer tables (by `constriction`), and a code of fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stillhouse.errors import MissingExtra, UserError
from stillhouse.methods.compression.entropic_student.prior import PRECISION, Tables

NIBBLE = 4
MOST_NIBBLES = 8


class RangeCoder:
    """Codes the symbols of one sample, channel by channel. A symbol outside its channel's table is coded as that of all
    others, and after the channel's symbols by its distance from the table, four bits at a time.

    Args:
        tables: of both sides; equal integers give equal strings on every machine.

    Raises:
        MissingExtra: `constriction` is not installed.
    """

    def __init__(self, tables: Tables) -> None:
        try:
            import constriction
        except ImportError:
            raise MissingExtra("The range coder", "codec") from None
        self.tables, self._queue, model = tables, constriction.stream.queue, constriction.stream.model
        counts = [tables.frequencies(i) for i in range(len(tables.lengths))]
        self._models = [model.Categorical(c / (1 << PRECISION), perfect=False) for c in counts]
        self._nibble, self._length = model.Uniform(1 << NIBBLE), model.Uniform(MOST_NIBBLES + 1)

    def encode(self, symbols: np.ndarray) -> bytes:
        """The string of a sample.

        Args:
            symbols: (C, h, w) integers.

        Raises:
            UserError: another number of channels.
        """
        self._check_channels(len(symbols))
        encoder = self._queue.RangeEncoder()
        for i, (channel, model) in enumerate(zip(symbols.reshape(len(symbols), -1), self._models)):
            index = channel.astype(np.int64) - self.tables.offsets[i]
            others = int(self.tables.lengths[i]) - 2
            outside = (index < 0) | (index >= others)
            encoder.encode(np.where(outside, others, index).astype(np.int32), model)
            for value in index[outside].tolist():
                self._encode_distance(encoder, 2 * (value - others) if value >= others else -2 * value - 1)
        words: np.ndarray = encoder.get_compressed()
        return words.astype("<u4").tobytes()

    def decode(self, string: bytes, shape: Sequence[int]) -> np.ndarray:
        """The symbols (C, h, w) int32 of a string.

        Raises:
            UserError: an empty string, or one that no encoder wrote.
        """
        self._check_channels(shape[0])
        if not string or len(string) % 4:
            raise UserError(
                f"A string of {len(string)} bytes was written by no encoder; it has whole words of 4 bytes."
            )
        decoder = self._queue.RangeDecoder(np.frombuffer(string, "<u4").astype(np.uint32))
        count = int(np.prod(shape[1:]))
        out = np.empty((shape[0], count), np.int64)
        try:
            for i, model in enumerate(self._models):
                others = int(self.tables.lengths[i]) - 2
                index = decoder.decode(model, count).astype(np.int64)
                for place in np.flatnonzero(index == others):
                    distance = self._decode_distance(decoder)
                    index[place] = -(distance + 1) // 2 if distance % 2 else others + distance // 2
                out[i] = index + self.tables.offsets[i]
        except (AssertionError, ValueError) as error:
            raise UserError(f"A string of {len(string)} bytes does not fit these tables: {error}.") from None
        return out.reshape(tuple(shape)).astype(np.int32)

    def _check_channels(self, given: int) -> None:
        if given != len(self._models):
            raise UserError(f"These tables are of {len(self._models)} channels, but the latent has {given}.")

    def _encode_distance(self, encoder: Any, distance: int) -> None:
        nibbles = -(-distance.bit_length() // NIBBLE)
        encoder.encode(np.array([nibbles], np.int32), self._length)
        digits = [distance >> NIBBLE * i & (1 << NIBBLE) - 1 for i in range(nibbles)]
        if digits:
            encoder.encode(np.array(digits, np.int32), self._nibble)

    def _decode_distance(self, decoder: Any) -> int:
        nibbles = int(decoder.decode(self._length))
        digits = decoder.decode(self._nibble, nibbles).tolist() if nibbles else []
        return sum(int(digit) << NIBBLE * i for i, digit in enumerate(digits))


class FixedCoder:
    """A code of `bits` bits for every symbol.

    Args:
        bits: 1 to 8; symbols are from 0 to 2^bits - 1.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def encode(self, symbols: np.ndarray) -> bytes:
        """The string of a sample's symbols (C, h, w)."""
        digits = np.unpackbits(symbols.astype(np.uint8).reshape(-1, 1), axis=1, bitorder="little")[:, : self.bits]
        return np.packbits(digits.reshape(-1), bitorder="little").tobytes()

    def decode(self, string: bytes, shape: Sequence[int]) -> np.ndarray:
        """The symbols (C, h, w) int32 of a string. Raises `UserError` for one of another length."""
        count = int(np.prod(shape))
        if len(string) != -(-count * self.bits // 8):
            raise UserError(f"A string of {len(string)} bytes holds no {count} symbols of {self.bits} bits.")
        digits = np.unpackbits(np.frombuffer(string, np.uint8), count=count * self.bits, bitorder="little")
        symbols = np.packbits(digits.reshape(count, self.bits), axis=1, bitorder="little")[:, 0]
        return symbols.reshape(tuple(shape)).astype(np.int32)


def scan_bytes(jpeg: bytes) -> int:
    """Bytes of the coded pixels of a baseline JPEG file, without its headers and tables.

    >>> scan_bytes(bytes.fromhex("ffd8ffda0004000011223344ffd9"))
    4
    """
    start = jpeg.index(b"\xff\xda") + 2
    return len(jpeg) - start - int.from_bytes(jpeg[start : start + 2], "big") - 2
