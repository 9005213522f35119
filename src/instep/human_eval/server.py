"""The human-evaluation server: the page, its requests, and the results. It listens on this machine alone."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.exceptions import HTTPException as AnyHTTPException

from instep.data.prompt import Prompt
from instep.human_eval import frames
from instep.human_eval.clip import VIDEOS
from instep.human_eval.guard import Guard, Tokens
from instep.human_eval.store import LONGEST_NAME, Conflict, Media, State, Store

HOST = "127.0.0.1"
PAGE = Path(__file__).parent / "page"
KEPT_SHEETS = 16  # in memory; a sheet is at most some tens of megabytes
Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
RequestId = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z-]{8,64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=4 * LONGEST_NAME)]
Word = Annotated[str, StringConstraints(max_length=40)]


class Who(BaseModel):
    """An annotator, by the name that was entered."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Name


class Undo(Who):
    """Undo the last answer; `request` is new for every click, and the same when a click is sent again."""

    request: RequestId


class Answer(Undo):
    """Answers to all questions of one item."""

    item: Id
    answers: dict[Word, Word]


def create_app(store: Store) -> FastAPI:
    """The application, which `Guard` wraps. All its responses about items are blind: they name sides, never runs."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        # without the input itself, which need not be text that can be sent
        problems = "; ".join(f"{'.'.join(str(part)[:40] for part in e['loc'][1:])}: {e['msg']}" for e in error.errors()[:5])
        return _error(422, problems.encode("ascii", "replace").decode())

    @app.exception_handler(AnyHTTPException)
    def refused(request: Request, error: AnyHTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Conflict)
    def conflict(request: Request, error: Conflict) -> Response:
        return _error(409, str(error))

    @app.exception_handler(ValueError)
    def wrong(request: Request, error: ValueError) -> Response:
        return _error(422, str(error).encode("ascii", "replace").decode())

    @app.exception_handler(sqlite3.OperationalError)
    def unavailable(request: Request, error: sqlite3.OperationalError) -> Response:
        return _error(503, f"store: nothing was kept ({error}); the page sends it again")  # a full disk, a lock: the page repeats what gets a 5xx

    @app.get("/")
    def page() -> Response:
        return HTMLResponse((PAGE / "index.html").read_text(encoding="utf-8"))

    @app.get("/page.js")
    def script() -> Response:
        return Response((PAGE / "page.js").read_bytes(), media_type="text/javascript")

    @app.get("/style.css")
    def style() -> Response:
        return Response((PAGE / "style.css").read_bytes(), media_type="text/css")

    @app.post("/api/join")
    def join(who: Who) -> dict[str, Any]:
        name = store.join(who.name)
        return shown(store, store.state(name)) | {"name": name}

    @app.post("/api/state")
    def state(who: Who) -> dict[str, Any]:
        return shown(store, store.state(who.name))

    @app.post("/api/answer")
    def answer(answer: Answer) -> dict[str, Any]:
        store.answer(answer.name, answer.item, answer.request, answer.answers)
        return shown(store, store.state(answer.name))

    @app.post("/api/undo")
    def undo(undo: Undo) -> dict[str, Any]:
        store.undo(undo.name, undo.request)
        return shown(store, store.state(undo.name))

    @app.get("/media/{id}")
    def media(id: str) -> Response:
        found = store.media.get(id)  # a fixed table: no path is ever built from the request
        if found is None or not found.path.is_file():
            raise HTTPException(404, "media: there is none of that name")
        return media_response(found)

    @app.get("/results")
    def results() -> Response:
        from instep.human_eval.figure import results_page
        from instep.human_eval.results import results as measured

        return HTMLResponse(results_page(measured(store)))

    return app


def shown(store: Store, state: State) -> dict[str, Any]:
    """An annotator's state for the page."""
    item = state.item
    return {
        "mode": store.mode,
        "done": state.done,
        "total": state.total,
        "questions": [{"key": q.key, "label": q.label, "hint": q.hint, "choices": q.choices} for q in store.questions],
        "item": None
        if item is None
        else {
            "id": item.id,
            "prompt": Prompt.parse(item.prompt).text,
            "before": dict(item.before),
            "left": _clip(item.left),
            "right": _clip(item.right) if item.right else None,
        },
    }


def _clip(media: Media) -> dict[str, Any]:
    clip = media.clip
    across = frames.columns(len(clip.durations)) if clip.durations else 0
    return {"id": media.id, "kind": clip.kind, "width": clip.width, "height": clip.height, "durations": clip.durations, "columns": across}


def media_response(media: Media) -> Response:
    """The media's content, without a file's name or date."""
    headers = {"cache-control": "private, max-age=86400, immutable", "etag": f'"{media.id}"'}
    if media.clip.kind == "frames":
        return Response(_sheet(media.path), media_type="image/png", headers=headers)
    kinds = VIDEOS | {".webp": "image/webp", ".gif": "image/gif", ".png": "image/png"}
    # ranges are answered: some browsers play no video without
    return FileResponse(media.path, media_type=kinds[media.path.suffix.lower()], headers=headers | {"last-modified": "Thu, 01 Jan 1970 00:00:00 GMT"})


@lru_cache(KEPT_SHEETS)
def _sheet(path: Path) -> bytes:
    return frames.sheet(path)


def _error(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)


def listen(port: int) -> socket.socket:
    """A socket on this machine's loopback address; ValueError if the port is taken."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port: {port} is not allowed; it is 0 (any free one) to 65535")
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
        bound.listen(128)  # the link works from the moment it is printed
    except OSError as error:
        bound.close()
        raise ValueError(f"port: {port} cannot be had ({error.strerror}); stop what uses it, or choose another with --port") from error
    return bound


def serve(store: Store, tokens: Tokens, bound: socket.socket) -> None:
    """Serves until it is interrupted. Requests are not logged: links hold tokens."""
    config = uvicorn.Config(
        Guard(create_app(store), tokens), log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=2, ws="none", lifespan="off"
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn repeats the signal once it has shut down
        uvicorn.Server(config).run(sockets=[bound])
