"""One engine in several processes: process 0 decides, and tells the others in which order what is done.

Every process has the whole loop, its schedulers too, and computes the same plans. What could differ between them is
when requests come, their seeds, when somebody gives up, and what functions of a user give: that is told, as a log of
orders, over a connection beside the devices. A process either asks the same as process 0 (one program in all of them),
or follows.
"""

import base64
import dataclasses
import json
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from jaxopt_llm.engine.generation import Allowed, Generation, Wanted
from jaxopt_llm.engine.inputs import Shape
from jaxopt_llm.engine.loop import Loop
from jaxopt_llm.engine.sampling import SamplingParams
from jaxopt_llm.sharding.hosts import link, spanned
from jaxopt_llm.sharding.link import Channel

_LOOK_S = 1.0  # a wait for orders, after which interrupts are handled
_ASKED_S = 60.0  # for what process 0 was asked to be asked here too

Make = Callable[..., Generation]


def loop_over(devices: Collection[jax.Device], alike: Sequence[str], make: Make, *args: Any) -> Loop:
    """The loop of this process, for an engine over devices.

    Args:
      devices: that the model lies on.
      alike: what must be the same in all processes, in words.
      make: a request of token ids, settings and wishes.
      *args: as `Loop` has them.

    Raises:
      ValueError: for devices of some of several processes, or what is not alike.
    """
    count = spanned(devices)
    peers = link() if count > 1 else None
    if peers is None:
        return Loop(*args)
    if count != peers.count:
        raise ValueError(
            f"the mesh reaches over {count} of {peers.count} processes; take devices of one, or of all"
        )
    if peers.index == 0:
        return Leading(peers.channel(), alike, *args)
    return Following(peers.channel(), alike, make, *args)


class Leading(Loop):
    """The loop of process 0: says what it does, before it does it."""

    def __init__(self, channel: Channel, alike: Sequence[str], *args: Any):
        super().__init__(*args)
        self._channel = channel
        self._tell("alike", list(alike))

    def add(self, generation: Generation) -> None:
        self._tell("add", generation.request.id, generation.seed, _asked(generation))
        if generation.allowed is not None:
            generation.allowed = self._telling(generation.allowed)
        super().add(generation)

    def cancel(self, generation: Generation) -> None:
        if not generation.ended:
            self._tell("cancel", generation.request.id)
            super().cancel(generation)

    def settle(self) -> None:
        self._tell("settle")
        super().settle()

    def warm_up(self, shape: Shape) -> None:
        self._tell("warm_up", shape)
        super().warm_up(shape)

    def advance(self) -> None:
        self._tell("advance")
        try:
            super().advance()
        except jax.errors.JaxRuntimeError:
            self._channel.link.settle()
            raise

    def _tell(self, order: str, *what: Any) -> None:
        self._channel.send(_json([order, *what]).encode())

    def _telling(self, allowed: Allowed) -> Allowed:
        """The same function; the others are told what it gives."""

        def told(tokens: Sequence[int]) -> Bool[np.ndarray, "V"] | None:
            try:
                found = allowed(tokens)
                mask = None if found is None else np.asarray(found)
                if mask is not None and mask.dtype != bool:
                    raise ValueError(f"it gave {mask.dtype}{list(mask.shape)} and must give bool")
            except Exception as error:
                self._tell("failed", str(error))
                raise
            self._tell("allowed", None if mask is None else [mask.shape, _text(mask)])
            return mask

        return told


class Following(Loop):
    """The loop of another process: does what process 0 says.

    Args:
      channel: to it.
      alike: what must be the same in all processes.
      make: a request of token ids, settings and wishes.
      *args: as `Loop` has them.

    Attributes:
      alone: requests are made as process 0 says, and nobody here asks for any.
      over: process 0 has no more to say.
    """

    def __init__(self, channel: Channel, alike: Sequence[str], make: Make, *args: Any):
        super().__init__(*args)
        self.alone = self.over = False
        self._channel, self._make = channel, make
        self._asked: defaultdict[str, deque[Generation]] = defaultdict(deque)
        self._known: weakref.WeakValueDictionary[int, Generation] = weakref.WeakValueDictionary()
        self._done: Counter[object] = Counter()
        self._held: list[Any] | None = None  # an order that waits for its like to be asked here
        self._late = 0.0
        self._check_alike(list(alike))

    def add(self, generation: Generation) -> None:
        if self.alone:
            raise ValueError("this process follows process 0; ask the engine there")
        self._asked[_key(_asked(generation))].append(generation)

    def cancel(self, generation: Generation) -> None:
        """Nothing: process 0 says when."""

    def settle(self) -> None:
        self._await("settle")

    def warm_up(self, shape: Shape) -> None:
        self._await(shape)

    def advance(self) -> None:
        """Does the next thing that process 0 says; nothing if it says nothing for a while.

        Raises:
          ValueError: if that is not what is asked for here.
        """
        try:
            order = self._held or self._next()
        except EOFError:
            self.over = True
            if self.alone:
                return
            raise ValueError(
                "process 0 has ended its work and this process waits for more; "
                "every process must ask the same of an engine, or call its follow()"
            ) from None
        if order is None:
            return
        try:
            self._do(*order)
        except jax.errors.JaxRuntimeError:
            self._channel.link.settle()
            raise

    def _next(self) -> list[Any] | None:
        message = self._channel.receive(timeout_s=_LOOK_S)
        return None if message is None else json.loads(message)

    def _do(self, order: str, *what: Any) -> None:
        self._held = None
        match order:
            case "advance":
                super().advance()
            case "add":
                self._take_up(*what)
            case "cancel":
                if generation := self._known.get(what[0]):
                    super().cancel(generation)
            case "warm_up":
                shape = Shape(*what[0])
                super().warm_up(shape)
                self._done[shape] += 1
            case "settle":
                if self.alone:
                    raise ValueError(
                        "process 0 exchanges the weights, and a process that follows has no others; "
                        "call update in every process"
                    )
                super().settle()
                self._done["settle"] += 1

    def _take_up(self, number: int, seed: int, asked: dict[str, Any]) -> None:
        if self.alone:
            generation = self._made(asked)
        elif own := self._asked.get(_key(asked)):
            generation = own.popleft()
        else:
            self._hold(["add", number, seed, asked])
            return
        self._late = 0.0
        generation.seed = seed
        if generation.allowed is not None:
            generation.allowed = self._told
        self._known[number] = generation
        super().add(generation)

    def _hold(self, order: list[Any]) -> None:
        """Another thread here may be about to ask for it."""
        now = time.monotonic()
        self._held, self._late = order, self._late or now + _ASKED_S
        if now > self._late:
            raise ValueError(
                "process 0 was asked for something that this process was not; "
                "every process must ask the same of an engine, or call its follow()"
            )
        time.sleep(0.002)

    def _await(self, order: object) -> None:
        """Does what process 0 says, up to this."""
        while not self._done[order]:
            self.advance()
        self._done[order] -= 1

    def _made(self, asked: dict[str, Any]) -> Generation:
        params = asked["params"]
        if params is not None:
            bias = params.pop("logit_bias")
            params = SamplingParams(**params, logit_bias=None if bias is None else dict(bias))
        return self._make(
            asked["prompt"],
            params,
            priority=asked["priority"],
            wanted=Wanted(**asked["wanted"]),
            allowed=self._told if asked["masked"] else None,
        )

    def _told(self, tokens: Sequence[int]) -> Bool[np.ndarray, "V"] | None:
        """What the function of process 0 gave."""
        order, what = self._answer()
        if order == "failed":
            raise ValueError(what)
        return None if what is None else _mask(*what)

    def _answer(self) -> list[Any]:
        while (answer := self._next()) is None:
            pass
        return answer

    def _check_alike(self, alike: list[str]) -> None:
        _, theirs = self._answer()
        for own, other in zip(alike, theirs, strict=True):
            if own != other:
                raise ValueError(f"this process has {own}, and process 0 has {other}; make them the same")


def _asked(generation: Generation) -> dict[str, Any]:
    """What identifies a request between processes, in JSON's types."""
    request, params = generation.request, dataclasses.asdict(generation.params)
    bias = params["logit_bias"]
    params |= {"stop": list(params["stop"]), "logit_bias": None if bias is None else sorted(bias.items())}
    return {
        "prompt": list(request.prompt),
        "params": params if request.max_tokens else None,
        "priority": request.priority,
        "wanted": dataclasses.asdict(generation.wanted),
        "masked": request.stepwise,
    }


def _key(asked: dict[str, Any]) -> str:
    return _json(asked)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=lambda scalar: scalar.item())  # NumPy's


def _text(mask: Bool[np.ndarray, "..."]) -> str:
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def _mask(shape: Sequence[int], text: str) -> Bool[np.ndarray, "..."]:
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)
