"""Pages of the KV cache: who holds which, and which keep a prefix that a later request may share.

Host only. Letters: G kinds of attention, R slots, P pages a slot. A page is `page_size` tokens of keys and values
of all layers of one kind. A kind is full attention, or a window of so many latest positions.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

_DIGEST_BYTES = 16  # 2**64 pages would have to be seen before two are likely to collide


def extend_chain(chain: list[bytes], tokens: Sequence[int], *, page_size: int) -> None:
    """Appends a digest for each full page of `tokens` that has none yet.

    Keys and values depend on everything before them, so a digest covers its page's tokens and, through its
    parent's digest, all pages before. Equal digests mean equal contents.

    Args:
      chain: digests of the first pages; appended to.
      tokens: the whole sequence.
      page_size: tokens a page.
    """
    fresh = np.asarray(tokens[len(chain) * page_size : len(tokens) // page_size * page_size], np.int32)
    parent = chain[-1] if chain else b""
    for page in fresh.reshape(-1, page_size):
        parent = hashlib.blake2b(parent + page.tobytes(), digest_size=_DIGEST_BYTES).digest()
        chain.append(parent)


class PagePool:
    """Pages of one kind of attention.

    Each is *used* (held by one sequence, or shared by several), *cached* (held by none, but registered under the
    digest of its contents, which may be wanted again) or *free*. Cached pages are taken when no free one is left,
    the least recently used first.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._digests: list[bytes | None] = [None] * num_pages
        self._registered: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.num_pages - self.available

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def __contains__(self, digest: bytes) -> bool:
        """Whether there is a page with these contents."""
        return digest in self._registered

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages with these contents; there must be one for each."""
        return [self._registered[digest] for digest in digests]

    def take(self, count: int) -> list[int]:
        """Pages for one sequence to write to; there must be as many `available`."""
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more sequence holds these pages."""
        for page in pages:
            if not self._holders[page]:
                del self._cached[page]
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One sequence gives up these pages, in the order of its tokens."""
        # Backwards, so that a chain's tail is evicted before its head: without the head nobody finds the tail.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._digests[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def register(self, page: int, digest: bytes) -> None:
        """Lets a full page be found. The first page with the same contents stays the one that is found."""
        if digest not in self._registered:
            self._registered[digest] = page
            self._digests[page] = digest

    def forget(self, digests: Iterable[bytes] | None = None) -> None:
        """Pages with these contents, or all, are not found any more; cached ones are free."""
        for digest in list(self._registered) if digests is None else digests:
            page = self._registered.pop(digest, None)
            if page is None:
                continue
            self._digests[page] = None
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        digest = self._digests[page]
        assert digest is not None, "only registered pages are cached"
        del self._registered[digest]
        self._digests[page] = None
        return page


class PageTables:
    """The pages of every slot, from one pool a kind.

    A slot holds, of every kind, the pages up to the same end; of a windowed kind those from the first that its next
    query sees. Table entries outside these are left from earlier: valid pages, but not the slot's own.
    """

    def __init__(
        self,
        *,
        num_pages: Sequence[int],
        windows: Sequence[int | None],
        page_size: int,
        max_slots: int,
        max_seq_len: int,
    ):
        self.pools = tuple(PagePool(count) for count in num_pages)
        self.page_size = page_size
        self._windows = tuple(windows)
        self._windowed = tuple(kind for kind, window in enumerate(windows) if window is not None)
        self._table = np.zeros((len(windows), max_slots, self.count(max_seq_len)), np.int32)
        self._snapshot: np.ndarray | None = None  # of the table as it is
        self._first = [[0] * max_slots for _ in windows]
        self._end = [0] * max_slots

    @property
    def windowed(self) -> bool:
        """Whether any kind gives pages back while a sequence goes on."""
        return bool(self._windowed)

    @property
    def available(self) -> int:
        """Pages by which the slots can grow in all."""
        return min(pool.available for pool in self.pools)

    def count(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)

    def peak(self, tokens: int) -> tuple[int, ...]:
        """Pages of each kind that a sequence holds at most, where its tokens go in one at a time."""
        whole = self.count(tokens)
        # A window that starts on a page's last token reaches one page further than its size says.
        return tuple(whole if w is None else min(whole, self.count(w - 1) + 1) for w in self._windows)

    def snapshot(self) -> Int32[np.ndarray, "G R P"]:
        """The table as it is; read-only, the same array until the table changes."""
        if self._snapshot is None:
            self._snapshot = self._table.copy()
            self._snapshot.flags.writeable = False
        return self._snapshot

    def held(self, kind: int, slot: int) -> list[int]:
        """The pages of a slot, in the order of its tokens."""
        return self._table[kind, slot, self._first[kind][slot] : self._end[slot]].tolist()

    def fits(self, chain: Sequence[bytes], tokens: int) -> bool:
        """Whether `admit` would find room."""
        return self._shared(chain, tokens) is not None

    def admit(self, slot: int, chain: Sequence[bytes], tokens: int) -> int | None:
        """Gives an empty slot the pages that it can share.

        Args:
          slot: which.
          chain: digests of the pages that may be shared.
          tokens: of the sequence; the rest of their pages must be there to take, though none is taken yet.

        Returns:
          how many leading pages are filled; None, and nothing is done, where there is no room.
        """
        shared = self._shared(chain, tokens)
        if shared is None:
            return None
        end = self.match(chain)
        for kind, (pool, pages) in enumerate(zip(self.pools, shared, strict=True)):
            first = self._first_seen(kind, end * self.page_size)
            pool.share(pages)
            self._put(kind, slot, first, pages)
            self._first[kind][slot] = first
        self._end[slot] = end
        return end

    def _shared(self, chain: Sequence[bytes], tokens: int) -> list[list[int]] | None:
        """Pages of each kind that a new sequence can share; None where there is no room for the others it takes."""
        end = self.match(chain)
        firsts = [self._first_seen(kind, end * self.page_size) for kind in range(len(self.pools))]
        shared = [pool.find(chain[first:end]) for pool, first in zip(self.pools, firsts, strict=True)]
        for pool, pages, peak in zip(self.pools, shared, self.peak(tokens), strict=True):
            idle = sum(not pool.holders(page) for page in pages)  # shared, they can no longer be taken
            if peak - len(pages) > pool.available - idle:
                return None
        return shared

    def lacks(self, slot: int, tokens: int) -> int:
        """Pages of each kind that a slot must take before it can hold so many tokens."""
        return max(0, self.count(tokens) - self._end[slot])

    def grow(self, slot: int, tokens: int) -> int:
        """Takes pages for the first `tokens` tokens of a slot, or as many as there are; for how many it has room."""
        if lacking := self.lacks(slot, tokens):
            end, more = self._end[slot], min(lacking, self.available)
            for kind, pool in enumerate(self.pools):
                self._put(kind, slot, end, pool.take(more))
            self._end[slot] = end + more
        return min(tokens, self._end[slot] * self.page_size)

    def register(self, slot: int, chain: Sequence[bytes], start: int, end: int) -> None:
        """Lets pages `start` to `end` of a slot be found."""
        for kind, pool in enumerate(self.pools):
            for page, digest in zip(
                self._table[kind, slot, start:end].tolist(), chain[start:end], strict=True
            ):
                pool.register(page, digest)

    def advance(self, slot: int, position: int) -> None:
        """Releases what no query from `position` on sees."""
        for kind in self._windowed:
            first, keep = self._first[kind][slot], self._first_seen(kind, position)
            if keep > first:
                self.pools[kind].release(self._table[kind, slot, first:keep].tolist())
                self._first[kind][slot] = keep

    def release(self, slot: int) -> None:
        """Releases all that a slot holds."""
        for kind, pool in enumerate(self.pools):
            pool.release(self.held(kind, slot))
        self._end[slot] = 0

    def forget(self, chain: Sequence[bytes] | None = None) -> None:
        """No page of this chain, or none at all, is shared with later requests."""
        for pool in self.pools:
            pool.forget(chain)

    def _put(self, kind: int, slot: int, start: int, pages: Sequence[int]) -> None:
        self._table[kind, slot, start : start + len(pages)] = pages
        self._snapshot = None

    def _first_seen(self, kind: int, position: int) -> int:
        """The first page that a query at this position reads."""
        window = self._windows[kind]
        return 0 if window is None else max(0, position - window + 1) // self.page_size

    def match(self, chain: Sequence[bytes]) -> int:
        """How many leading pages can be shared: of each kind, those that the query after them sees must be found."""
        best = 0
        since = [0] * len(self.pools)  # where the unbroken run of pages found so far starts, of each kind
        for end, digest in enumerate(chain, 1):
            for kind, pool in enumerate(self.pools):
                if digest not in pool:
                    since[kind] = end
                    if self._windows[kind] is None:
                        return best  # full attention sees all of them, so no more can match
            if all(run <= self._first_seen(kind, end * self.page_size) for kind, run in enumerate(since)):
                best = end
        return best
