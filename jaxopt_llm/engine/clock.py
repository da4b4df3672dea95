"""How long the device works, told by a host that is not always there to see it. Host only."""


class Clock:
    """Times dispatches that run one after another.

    The host knows when one was over only where it was waiting for it. Where it came later, whatever it did meanwhile,
    the device may have stood idle since.

    Attributes:
      worked: seconds that the device was seen at work.
    """

    def __init__(self) -> None:
        self.worked = 0.0
        self._over, self._seen = 0.0, True  # when the latest was over, or was found to be

    def over(self, sent: float, now: float, *, waited: bool) -> float | None:
        """Takes in that the next one is over.

        Args:
          sent: when it was.
          now: in the same seconds.
          waited: whether the host saw it end, just now.

        Returns:
          the seconds that the device took for it; None where its start or its end is not known.
        """
        known = waited and (self._seen or sent >= self._over)
        seconds = now - max(sent, self._over)
        if waited:
            self.worked += seconds
        self._over, self._seen = now, waited
        return seconds if known else None
