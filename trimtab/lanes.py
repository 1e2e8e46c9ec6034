"""Which of the replicas' own ports a call goes to: in turn, and not to one that has just failed."""

LOOK_INTERVAL_S, LOOK_TIMEOUT_S = 5.0, 1.0  # how often the endpoint is asked where the replicas are, and how long that may take
ASIDE_S = 30.0
MIN_ASIDE_S = 1.0  # whatever a replica says of itself: one that fails at once must not be asked in a circle


class DirectLanes:
    """The lanes that are known. May be shared by threads: each step replaces a whole value, and a look too many does no harm."""

    def __init__(self) -> None:
        self._urls: list[str] = []
        self._looked_s = float("-inf")
        self._aside_until_s: dict[str, float] = {}
        self._num_taken = 0

    def are_old(self, now_s: float) -> bool:
        return now_s - self._looked_s >= LOOK_INTERVAL_S

    def begin_look(self, now_s: float) -> None:
        """Note that somebody asks now, so that the others need not."""
        self._looked_s = now_s

    def replace(self, urls: list[str], *, now_s: float) -> None:
        """Take in what the endpoint says."""
        self._looked_s = now_s
        self._urls = [str(url).rstrip("/") for url in urls]
        known, aside = set(self._urls), self._aside_until_s
        self._aside_until_s = {url: until_s for url, until_s in list(aside.items()) if url in known}

    def add(self, urls: list[str]) -> None:
        """Take in what a replica says, which may not know all others: those that are gone are set aside when they fail."""
        self._urls = list(dict.fromkeys([*self._urls, *(str(url).rstrip("/") for url in urls)]))

    def set_aside(self, url: str, *, now_s: float, seconds: float = ASIDE_S) -> None:
        self._aside_until_s[url] = now_s + max(seconds, MIN_ASIDE_S)

    def next(self, now_s: float) -> str | None:
        """Return the next one's URL, or None when there is none to use."""
        usable = [url for url in self._urls if self._aside_until_s.get(url, 0.0) <= now_s]
        if not usable:
            return None
        self._num_taken += 1
        return usable[self._num_taken % len(usable)]
