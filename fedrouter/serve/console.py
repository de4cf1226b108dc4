"""The console at ``/fedrouter/``: static files, open to everyone; its data needs the API key."""

from importlib.resources import files

from fedrouter.serve.asgi import Answer, Headers
from fedrouter.serve.paths import CONSOLE

FILES = {"": "index.html", "console.css": "console.css", "console.js": "console.js", "icon.svg": "icon.svg"}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE: Headers = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)


class Console:
    """Serves the console's files."""

    def __init__(self, on: bool = True):
        self._answers: dict[str, Answer] = {}
        if not on:
            return
        for path, name in FILES.items():
            kind = KINDS[name.rpartition(".")[2]]
            content = (files("fedrouter.serve") / "page" / name).read_bytes()
            headers = ((b"content-type", f"{kind}; charset=utf-8".encode()), *SAFE)
            self._answers[CONSOLE + path] = Answer(200, content, headers)
        location = ((b"location", b"fedrouter/"), *SAFE)  # relative: a proxy may add a path prefix
        self._answers[CONSOLE.rstrip("/")] = Answer(307, b"", location)

    def answer(self, method: str, path: str) -> Answer | None:
        """Return the response; None if the path is not the console's."""
        found = self._answers.get(path) if method in ("GET", "HEAD") else None
        return found if found is None or method == "GET" else Answer(found.status, b"", found.headers)
