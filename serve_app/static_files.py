"""Which files the dashboard consists of: a fixed list, read once, so that no path from a request reaches the disk."""

from pathlib import Path

STATIC_DIRECTORY = Path(__file__).parent / "static"
CONTENT_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}


def read_static_files(directory: Path = STATIC_DIRECTORY) -> dict[str, tuple[bytes, bytes]]:
    """Return relative path to (content type, bytes) of the files with a known suffix."""
    return {
        path.relative_to(directory).as_posix(): (CONTENT_TYPES[path.suffix], path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.suffix in CONTENT_TYPES and path.is_file()
    }
