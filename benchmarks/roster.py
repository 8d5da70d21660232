"""This project and its peers by name: how each starts on a checkpoint, and why one does not.

All compute in float32 with the same number of threads, but for those whose name says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from checkpoints import Shape, checkpoint, ct2_checkpoint
from harness import progress
from peers import Peer, PeerError

from trivium.process import wait_passively

VLLM_VARIABLE = "TRIVIUM_BENCH_VLLM"  # the interpreter of an environment with vLLM
EXACT, HALF, BFLOAT16, INT8 = "trivium float32", "trivium 16-bit", "trivium bfloat16", "trivium int8"
HF, HF_BF16, CONTINUOUS = "transformers generate", "transformers generate bfloat16", "transformers continuous"
CT2, CT2_INT8, CT2_HALF = "CTranslate2 float32", "CTranslate2 int8", "CTranslate2 16-bit"
VLLM = "vLLM"
CT2_MODES = (CT2, CT2_INT8, CT2_HALF)


@dataclass(frozen=True, slots=True)
class Maker:
    """Starts peers by name.

    peers_spin: threads of the others wait as they do by default, not as ours. With two threads on a busy machine they
    then wait for each other most of the time: CTranslate2 took 17 s instead of 5 s for eight sentences.
    """

    num_threads: int
    peers_spin: bool = False
    vllm_is_eager: bool = True

    def start(self, shape: Shape, name: str) -> Peer:
        """Raises PeerError if the peer is not installed, or cannot run this model on this machine."""
        if name in (EXACT, HALF, BFLOAT16, INT8):
            return self._trivium(shape, name)
        if name in (HF, HF_BF16, CONTINUOUS):
            return self._transformers(shape, name)
        if name in CT2_MODES:
            return self._ctranslate2(shape, name)
        assert name == VLLM, f"an unknown peer: {name}"
        return self._vllm(shape)

    def _trivium(self, shape: Shape, name: str) -> Peer:
        return Peer(
            name,
            "Trivium",
            environment=_passive(),
            checkpoint=str(checkpoint(shape)),
            num_threads=self.num_threads,
            quantization="int8" if name == INT8 else None,
            dtype="bfloat16" if name == BFLOAT16 else "auto",
        )

    def _transformers(self, shape: Shape, name: str) -> Peer:
        return Peer(
            name,
            "TransformersContinuous" if name == CONTINUOUS else "Transformers",
            environment=self._environment(OMP_NUM_THREADS=str(self.num_threads)),  # of the manager's thread, too
            checkpoint=str(checkpoint(shape)),
            num_threads=self.num_threads,
            model_class=shape.model_class,
            is_encoder_decoder=shape.is_encoder_decoder,
            dtype="bfloat16" if name == HF_BF16 else "float32",
        )

    def _ctranslate2(self, shape: Shape, name: str) -> Peer:
        return Peer(
            name,
            "CTranslate2",
            environment=self._environment(),
            checkpoint=str(ct2_checkpoint(shape)),
            num_threads=self.num_threads,
            compute_type=_compute_type(name),
            is_encoder_decoder=shape.is_encoder_decoder,
        )

    def _environment(self, **more: str) -> dict[str, str]:
        return {**({} if self.peers_spin else _passive()), **more}

    def _vllm(self, shape: Shape) -> Peer:
        python = os.environ.get(VLLM_VARIABLE, "")
        if not python:
            raise PeerError(f"{VLLM}: not here: {VLLM_VARIABLE} names no interpreter that has it")
        cores = sorted(os.sched_getaffinity(0))[: self.num_threads]
        environment = self._environment(VLLM_CPU_KVCACHE_SPACE="2", VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)))
        openmp = Path(python).parent.parent / "lib" / "libiomp5.so"  # its documentation asks for this one
        if openmp.exists():
            environment["LD_PRELOAD"] = str(openmp)
        return Peer(
            VLLM,
            "Vllm",
            python=python,
            environment=environment,
            checkpoint=str(checkpoint(shape)),
            num_threads=self.num_threads,
            eager=self.vllm_is_eager,
        )


def _passive() -> dict[str, str]:
    """How threads of `trivium serve` wait for work: they spin for a moment, then sleep."""
    environment = dict[str, str]()
    wait_passively(environment)
    return environment


def _compute_type(name: str) -> str:
    """CTranslate2's word. Raises PeerError."""
    if name != CT2_HALF:
        return name.rpartition(" ")[2]
    import ctranslate2

    supported = ctranslate2.get_supported_compute_types("cpu")
    halves = [kind for kind in ("bfloat16", "float16") if kind in supported]
    if not halves:
        raise PeerError(f"{name}: not here: on this CPU it computes in {', '.join(sorted(supported))} only")
    return halves[0]


class Roster:
    """The peers that are compared on one checkpoint. Owner of their processes; a context manager."""

    def __init__(self, maker: Maker, shape: Shape, names: Sequence[str]) -> None:
        """One that cannot start is `missing`, whatever the reason."""
        self.shape = shape
        self._peers: dict[str, Peer] = {}
        self._not_started: dict[str, str] = {}
        for name in names:
            progress(f"{shape.name}: starting {name}")
            try:
                self._peers[name] = maker.start(shape, name)
            except KeyboardInterrupt:
                self.close()
                raise
            except PeerError as error:
                self._not_started[name] = str(error).partition(": ")[2]
            except Exception as error:  # conversions for a peer that does not know the model, missing packages
                self._not_started[name] = f"{type(error).__name__}: {error}"[:200]

    @property
    def all_started(self) -> list[Peer]:
        return list(self._peers.values())

    @property
    def alive(self) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.failure is None]

    @property
    def missing(self) -> dict[str, str]:
        """The reason, by the name of the peer."""
        failed = {peer.name: peer.failure for peer in self._peers.values() if peer.failure is not None}
        return {**self._not_started, **failed}

    def only(self, *names: str) -> list[Peer]:
        return [peer for peer in self.alive if peer.name in names]

    def close(self) -> None:
        for peer in self.alive:
            peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
