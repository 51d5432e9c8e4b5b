"""Weights from a server on this machine: whole, of the right content, with a token where it belongs, or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl_cli.core.errors import CheckpointError, ConfigError, MedsslError, ResourceError
from medssl_cli.services.download import DownloadRequest, check_size, download, list_published
from medssl_cli.services.download_checks import check_weights
from medssl_cli.services.download_settings import DownloadSettings, read_dotenv, read_settings
from medssl_cli.services.download_transfer import Candidate, check_address, fetch, probe

FAST = {"DOWNLOAD_RETRIES": "0", "DOWNLOAD_BACKOFF": "0", "DOWNLOAD_CHUNK_MB": "0.001"}


@dataclass
class File:
    """How one path of the server answers.

    Args:
        body: Bytes of the file.
        breaks_at: The connection ends after these bytes of each answer.
        announces: Content-Length in place of the true one; -1 leaves it out.
        leads_to: Address of a redirect.
        status: Of a plain answer.
    """

    body: bytes = b""
    etag: str = '"one"'
    breaks_at: int | None = None
    announces: int | None = None
    leads_to: str = ""
    status: int = 200
    content_type: str = "application/octet-stream"
    has_ranges: bool = True
    has_head: bool = True


@dataclass
class Server:
    """A web server of its own; ``log`` holds (method, path, headers) of each request."""

    port: int
    files: dict[str, File] = field(default_factory=dict)
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    """Answers of ``Server.files``, with ranges as of RFC 9110."""

    server_facts: Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.server_facts.log.append((self.command, self.path, dict(self.headers)))
        file = self.server_facts.files.get(self.path)
        if file is None or (self.command == "HEAD" and not file.has_head):
            self.send_error(404 if file is None else 405)
            return
        if file.leads_to:
            self.send_response(302)
            self.send_header("Location", file.leads_to)
            self.end_headers()
            return
        if file.status != 200:
            self.send_error(file.status)
            return
        start, end, status = 0, len(file.body), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if file.has_ranges else None
        if asked and self.headers.get("If-Range", file.etag) == file.etag:
            start, status = int(asked[1]), 206
            end = min(len(file.body), int(asked[2]) + 1) if asked[2] else len(file.body)
        if status == 206 and start >= len(file.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(file.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(file.body)}")
        announced = end - start if file.announces is None else file.announces
        if announced >= 0:
            self.send_header("Content-Length", str(announced))
        self.send_header("ETag", file.etag)
        self.send_header("Content-Type", file.content_type)
        self.end_headers()
        if with_body:
            self.wfile.write(file.body[start:end][: file.breaks_at])

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that leaves this machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1", "localhost"), f"a test reached for {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    for key in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)


def serve() -> tuple[ThreadingHTTPServer, Server]:
    facts = Server(0)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"server_facts": facts}))
    httpd.daemon_threads = True
    facts.port = httpd.server_address[1]
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    return httpd, facts


@pytest.fixture
def server() -> Iterator[Server]:
    httpd, facts = serve()
    yield facts
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A checkpoint as PyTorch writes it."""
    buffer = io.BytesIO()
    torch.save({"teacher": {"backbone.cls_token": torch.arange(4000.0)}}, buffer)
    return buffer.getvalue()


def get(server: Server, out: Path, path: str = "/model.pth", name: str = "meddinov3", **more: Any) -> Any:
    environment = {**FAST, **more.pop("environment", {})}
    request = DownloadRequest(name, url=server.url(path) if path else None, out=out, **more)
    return download(request, environment=environment, folder=out.parent)


def left(out: Path) -> set[str]:
    """Names in a folder, its lock left out."""
    return {path.name for path in out.iterdir() if path.name != ".lock"} if out.is_dir() else set()


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_weights_arrive_whole_with_their_record(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights)
    result = get(server, tmp_path / "w")
    assert (tmp_path / "w" / "model.pth").read_bytes() == weights
    record = json.loads((tmp_path / "w" / "model.pth.json").read_text(encoding="utf-8"))
    assert record["sha256"] == hashlib.sha256(weights).hexdigest()
    assert (record["size"], record["url"]) == (len(weights), server.url("/model.pth"))
    assert (record["announced"], record["sha256_checked"], record["format"]) == (True, False, "torch")
    assert record["started_at"].endswith("+00:00")
    assert left(tmp_path / "w") == {"model.pth", "model.pth.json"}
    assert f"medssl convert weights {tmp_path / 'w' / 'model.pth'} OUT --source meddinov3" in result.summary()


def test_second_time_nothing_is_fetched_and_force_fetches(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights)
    get(server, tmp_path / "w")
    asked = len(server.log)
    again = get(server, tmp_path / "w")
    assert (len(server.log), again.facts["downloaded"]) == (asked, False)
    assert get(server, tmp_path / "w", force=True).facts["downloaded"]
    assert len(server.log) > asked


def test_file_changed_since_is_rejected(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights)
    get(server, tmp_path / "w")
    path = tmp_path / "w" / "model.pth"
    path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed since") as refused:
        get(server, tmp_path / "w")
    assert "--force" in refused.value.fix


def test_known_digest_passes_and_another_leaves_nothing(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights)
    digest = hashlib.sha256(weights).hexdigest()
    with pytest.raises(CheckpointError) as refused:
        get(server, tmp_path / "w", sha256="0" * 64)
    assert (refused.value.code, refused.value.exit_code) == ("download_sha256", 7)
    assert digest in refused.value.where
    assert left(tmp_path / "w") == set()
    assert get(server, tmp_path / "w", sha256=digest.upper()).facts["sha256_checked"]


# --- M28: incomplete, pages ------------------------------------------------------------------------------------------


def test_m28_announced_100_sent_60_leaves_no_final_file(server: Server, tmp_path: Path) -> None:
    server.files["/model.pth"] = File(b"PK\x03\x04" + bytes(96), breaks_at=60)
    with pytest.raises(ResourceError) as refused:
        get(server, tmp_path / "w")
    assert (refused.value.exit_code, refused.value.code) == (6, "download_network")
    assert "60 of 100 bytes" in refused.value.where
    assert not (tmp_path / "w" / "model.pth").exists()
    assert (tmp_path / "w" / "model.pth.part").stat().st_size == 60


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>",
        b"\n  <html><body>login</body></html>",
        b'{"error": "Access to model is restricted"}',
    ],
)
@pytest.mark.parametrize("content_type", ["application/octet-stream", "text/html; charset=utf-8"])
def test_m28_page_is_rejected(server: Server, tmp_path: Path, body: bytes, content_type: str) -> None:
    server.files["/model.pth"] = File(body, content_type=content_type)
    with pytest.raises(CheckpointError) as refused:
        get(server, tmp_path / "w")
    assert (refused.value.exit_code, refused.value.code) == (7, "download_page")
    assert left(tmp_path / "w") == set()


def test_m28_failed_fetch_leaves_the_older_file(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights)
    get(server, tmp_path / "w")
    before = {path: path.read_bytes() for path in (tmp_path / "w").glob("model*")}
    server.files["/model.pth"] = File(b"<html>moved</html>")
    with pytest.raises(CheckpointError):
        get(server, tmp_path / "w", force=True)
    assert {path: path.read_bytes() for path in (tmp_path / "w").glob("model*")} == before


def test_size_that_is_not_announced_is_recorded_as_such(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights, announces=-1)
    get(server, tmp_path / "w")
    record = json.loads((tmp_path / "w" / "model.pth.json").read_text(encoding="utf-8"))
    assert record["announced"] is False


# --- going on --------------------------------------------------------------------------------------------------------


def test_broken_connection_is_taken_up_where_it_ended(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights, breaks_at=5000)
    get(server, tmp_path / "w", environment={"DOWNLOAD_RETRIES": "9"})
    assert (tmp_path / "w" / "model.pth").read_bytes() == weights
    asked = [headers.get("Range") for _, _, headers in server.log]
    assert asked[:3] == [None, "bytes=5000-", "bytes=10000-"]


def test_next_run_goes_on_with_the_part(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights, breaks_at=5000)
    with pytest.raises(ResourceError):
        get(server, tmp_path / "w")
    server.files["/model.pth"] = File(weights)
    get(server, tmp_path / "w")
    assert server.log[-1][2]["Range"] == "bytes=5000-"
    assert (tmp_path / "w" / "model.pth").read_bytes() == weights
    assert left(tmp_path / "w") == {"model.pth", "model.pth.json"}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("longer", [True, False])
def test_part_of_another_file_is_not_joined(
    server: Server, tmp_path: Path, weights: bytes, ranges: bool, longer: bool
) -> None:
    server.files["/model.pth"] = File(b"PK\x03\x04" + bytes(2 * len(weights)), breaks_at=5000, etag='"old"')
    with pytest.raises(ResourceError):
        get(server, tmp_path / "w")
    if longer:
        with (tmp_path / "w" / "model.pth.part").open("ab") as part:
            part.write(bytes(len(weights)))
    server.files["/model.pth"] = File(weights, etag='"new"', has_ranges=ranges)
    get(server, tmp_path / "w", environment={"DOWNLOAD_RETRIES": "2"})
    assert (tmp_path / "w" / "model.pth").read_bytes() == weights


def test_416_counts_as_complete_only_at_the_announced_size(server: Server, tmp_path: Path, weights: bytes) -> None:
    part = tmp_path / "model.pth.part"
    candidate = Candidate(server.url("/model.pth"), "test", "model.pth")
    settings = DownloadSettings({}, retries=1, backoff_s=0)
    server.files["/model.pth"] = File(weights)
    for body in (weights, weights + b"tail"):
        note = {"url": candidate.url, "size": len(weights), "etag": '"one"'}
        part.write_bytes(body)
        part.with_name("model.pth.part.json").write_text(json.dumps(note), encoding="utf-8")
        server.log.clear()
        fetch(candidate, part, settings)
        assert part.read_bytes() == weights
        assert len(server.log) == (1 if body == weights else 2)


def test_lasting_faults_are_tried_again_and_final_ones_are_not(server: Server, tmp_path: Path) -> None:
    for status, attempts in ((503, 3), (429, 3), (404, 1), (403, 1)):
        server.files["/model.pth"] = File(status=status)
        server.log.clear()
        with pytest.raises(ResourceError, match="could not be fetched") as refused:
            get(server, tmp_path / "w", environment={"DOWNLOAD_RETRIES": "2"})
        assert str(status) in refused.value.where
        assert len(server.log) == attempts


def test_silent_server_ends_with_6(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/model.pth"
        with pytest.raises(ResourceError) as refused:
            download(
                DownloadRequest("meddinov3", url=url, out=tmp_path / "w", timeout_s=0.2),
                environment=FAST,
                folder=tmp_path,
            )
    assert refused.value.exit_code == 6


# --- tokens and redirects --------------------------------------------------------------------------------------------


def test_token_stays_with_its_host(server: Server, tmp_path: Path, weights: bytes) -> None:
    httpd, other = serve()
    try:
        other.files["/cdn"] = File(weights)
        server.files["/cdn"] = File(weights)
        settings = DownloadSettings({}, retries=0)
        for target, seen in ((other.url("/cdn", host="localhost"), False), (server.url("/cdn"), True)):
            server.files["/model.pth"] = File(leads_to=target)
            server.log.clear()
            candidate = Candidate(server.url("/model.pth"), "test", "model.pth", "secret", "127.0.0.1")
            fetch(candidate, tmp_path / f"{seen}.part", settings)
            assert server.log[0][2]["Authorization"] == "Bearer secret"
            last = (server if seen else other).log[-1][2]
            assert last.get("Authorization") == ("Bearer secret" if seen else None)
            assert "secret" not in json.dumps([*other.log])
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_token_of_hugging_face_is_not_sent_elsewhere(server: Server, tmp_path: Path, weights: bytes) -> None:
    mirror = {"HF_MIRROR": server.url(""), "HUGGINGFACE_TOKEN": "hf_secret"}
    server.files["/ricklisz123/MedDINOv3-ViTB-16-CT-3M/resolve/main/model.pth"] = File(weights)
    result = get(server, tmp_path / "w", path="", environment=mirror)
    assert result.facts["origin"] == "HF_MIRROR"
    assert "hf_secret" not in json.dumps(server.log)
    assert "hf_secret" not in (tmp_path / "w" / "model.pth.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,PK"])
def test_redirect_out_of_http_is_refused(server: Server, tmp_path: Path, target: str) -> None:
    server.files["/model.pth"] = File(leads_to=target)
    with pytest.raises(ResourceError):
        get(server, tmp_path / "w")
    assert not (tmp_path / "w" / "model.pth").exists()


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x", "model.pth", "http://", "https://a b/c", "http://h:x/", "http://[::1"]
)
def test_only_http_addresses_are_taken(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_address(url, "--url")
    assert refused.value.exit_code == 2


def test_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        check_address("https://me:hunter2@host/x", "--url")
    assert "hunter2" not in str(refused.value)


# --- where from and where to -----------------------------------------------------------------------------------------


def test_addresses_are_tried_in_their_order(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/gone"] = File(status=404)
    server.files["/hf/me/repo/resolve/main/w.pth"] = File(weights)
    keys = {
        "MEDDINOV3_URL": server.url("/gone"),
        "HF_MIRROR": server.url("/hf"),
        "MEDDINOV3_HF_REPO": "me/repo",
        "MEDDINOV3_FILENAME": "w.pth",
    }
    result = get(server, tmp_path / "w", path="", environment=keys)
    assert [path for _, path, _ in server.log] == ["/gone", "/hf/me/repo/resolve/main/w.pth"]
    assert result.facts["path"].endswith("w/w.pth")


def test_google_drive_is_the_last_address(tmp_path: Path) -> None:
    keys = {"MEDDINOV3_GDRIVE_URL": "https://drive.google.com/file/d/1AbCdEfGhIjKlMn/view?usp=sharing"}
    models = {m["name"]: m for m in list_published(environment=keys, folder=tmp_path).facts["models"]}
    assert models["meddinov3"]["urls"] == [
        "https://huggingface.co/ricklisz123/MedDINOv3-ViTB-16-CT-3M/resolve/main/model.pth",
        "https://drive.usercontent.google.com/download?id=1AbCdEfGhIjKlMn&export=download&confirm=t",
    ]


def test_folder_comes_from_the_keys_in_their_order(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights)
    tail = "meddinov3/MedDINOv3-ViTB-16-CT-3M/model.pth"
    environment = {**FAST, "MEDDINOV3_URL": server.url("/model.pth"), "MODELS_DIR": str(tmp_path / "models")}
    download(DownloadRequest("meddinov3"), environment=environment, folder=tmp_path)
    assert (tmp_path / "models" / tail).read_bytes() == weights
    environment["MEDSSL_HOME"] = str(tmp_path / "home")
    download(DownloadRequest("meddinov3"), environment=environment, folder=tmp_path)
    assert (tmp_path / "home" / tail).read_bytes() == weights
    environment["MEDDINOV3_CKPT_PATH"] = str(tmp_path / "exact.pth")
    download(DownloadRequest("meddinov3"), environment=environment, folder=tmp_path)
    assert (tmp_path / "exact.pth").read_bytes() == weights


@pytest.mark.parametrize(
    "keys", [{"MEDDINOV3_SUBDIR": "../../x"}, {"MEDDINOV3_SUBDIR": "/tmp/x"}, {"MEDDINOV3_FILENAME": ".."}]
)
def test_r13_paths_stay_in_the_folder(server: Server, tmp_path: Path, weights: bytes, keys: dict[str, str]) -> None:
    server.files["/model.pth"] = File(weights)
    environment = {**FAST, **keys, "MEDSSL_HOME": str(tmp_path / "home"), "MEDDINOV3_URL": server.url("/model.pth")}
    with pytest.raises(ConfigError) as refused:
        download(DownloadRequest("meddinov3"), environment=environment, folder=tmp_path)
    assert refused.value.code == "path_escapes"
    assert not server.log


def test_r13_name_from_an_address_stays_in_the_folder(server: Server, tmp_path: Path, weights: bytes) -> None:
    for tail in ("/..%2f..%2fx.pth", "/%2e%2e"):
        server.files[tail] = File(weights)
        with pytest.raises(ConfigError):
            get(server, tmp_path / "w", path=tail, name="dinov3")
    assert not (tmp_path / "x.pth").exists()


def test_unknown_name_and_missing_address_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights named") as refused:
        download(DownloadRequest("meddino3"), environment={}, folder=tmp_path)
    assert "did you mean meddinov3" in refused.value.fix
    with pytest.raises(ConfigError) as refused:
        download(DownloadRequest("dinov3"), environment={}, folder=tmp_path)
    assert "DINOV3_URL" in refused.value.fix
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        download(DownloadRequest("meddinov3", sha256="abc"), environment={}, folder=tmp_path)


# --- .env ------------------------------------------------------------------------------------------------------------


def test_dotenv_is_read_as_plain_settings_and_the_environment_wins(tmp_path: Path) -> None:
    text = '# weights\n\nexport HF_MIRROR="https://mirror.example"\nDOWNLOAD_RETRIES = 7 # tries\nMODELS_DIR=a b\n'
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    settings = read_settings({"DOWNLOAD_RETRIES": "2", "HF_MIRROR": " "}, tmp_path, ())
    assert (settings.retries, settings.get("HF_MIRROR")) == (2, "https://mirror.example")
    assert settings.get("MODELS_DIR") == "a b"
    assert read_settings({}, tmp_path, ()).retries == 7


@pytest.mark.parametrize(
    "line",
    ["X=$(touch pwned)", "X=`touch pwned`", "touch pwned", "if true; then X=1; fi", "X=<(touch pwned)", "=value", "\0"],
)
def test_r14_dotenv_with_shell_code_is_refused(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"HF_MIRROR=https://mirror.example\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        read_dotenv(tmp_path / ".env")
    assert refused.value.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == {".env"}


def test_r14_variables_are_not_expanded(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MODELS_DIR=${HOME}/x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="variable"):
        read_settings({}, tmp_path, ())


def test_wrong_numbers_are_named_at_once(tmp_path: Path) -> None:
    keys = {
        "DOWNLOAD_RETRIES": "1.5",
        "DOWNLOAD_READ_TIMEOUT": "soon",
        "DOWNLOAD_BACKOFF": "-1",
        "DOWNLOAD_CHUNK_MB": "nan",
    }
    with pytest.raises(ConfigError) as refused:
        read_settings(keys, tmp_path, ())
    assert all(key in refused.value.where for key in keys)
    with pytest.raises(ConfigError):
        read_settings({}, tmp_path, (), timeout_s=0.0)


# --- content ---------------------------------------------------------------------------------------------------------


def zipped(names: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in names.items():
            archive.writestr(name, body)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(zipped({"model/data.pkl": b"x", "../../evil.py": b"x"}), id="traversal"),
        pytest.param(zipped({"model/data.pkl": b"x", "/etc/evil": b"x"}), id="absolute"),
        pytest.param(zipped({"model/readme.txt": b"x"}), id="no-weights"),
        pytest.param(zipped({"model/data.pkl": b"x" * 999})[:-40], id="cut"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(99), id="png"),
        pytest.param(b"\x40\0\0\0\0\0\0\0{" + bytes(20), id="safetensors-cut"),
        pytest.param(b"", id="empty"),
    ],
)
def test_r14_what_is_no_weight_file_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(body)
    with pytest.raises(CheckpointError) as refused:
        check_weights(tmp_path / "w.pth", "here")
    assert refused.value.exit_code == 7


def test_damaged_entry_of_the_archive_is_found(tmp_path: Path, weights: bytes) -> None:
    middle = len(weights) // 2
    (tmp_path / "w.pth").write_bytes(weights[:middle] + bytes([weights[middle] ^ 255]) + weights[middle + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        check_weights(tmp_path / "w.pth", "here")


def test_formats_are_told_apart(tmp_path: Path, weights: bytes) -> None:
    from safetensors.torch import save_file

    (tmp_path / "new.pth").write_bytes(weights)
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    kinds = [check_weights(tmp_path / name, "here") for name in ("new.pth", "old.pth", "x.safetensors")]
    assert kinds == ["torch", "torch-legacy", "safetensors"]


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
def test_size_is_asked_for_without_the_file(server: Server, tmp_path: Path, weights: bytes, head: bool) -> None:
    server.files["/model.pth"] = File(weights, has_head=head)
    candidate = Candidate(server.url("/model.pth"), "test", "model.pth")
    assert probe(candidate, DownloadSettings({}, retries=0)).size == len(weights)
    assert [method for method, _, _ in server.log] == (["HEAD"] if head else ["HEAD", "GET"])
    if not head:
        assert server.log[-1][2]["Range"] == "bytes=0-0"


def test_check_size_compares_and_fetches_nothing(server: Server, tmp_path: Path, weights: bytes) -> None:
    server.files["/model.pth"] = File(weights)
    request = DownloadRequest("meddinov3", url=server.url("/model.pth"), out=tmp_path / "w")

    def equal() -> tuple[Any, MedsslError | None]:
        result = check_size(request, environment=FAST, folder=tmp_path)
        assert result.facts["announced_bytes"] == len(weights)
        return result.facts["equal"], result.error

    assert equal() == (None, None)
    assert not (tmp_path / "w").exists()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "model.pth").write_bytes(weights)
    assert equal() == (True, None)
    (tmp_path / "w" / "model.pth").write_bytes(weights[:-1])
    same, error = equal()
    assert same is False
    assert error is not None
    assert error.exit_code == 7


def test_r20_home_is_hidden_in_what_is_kept(
    server: Server, tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    server.files["/model.pth"] = File(weights)
    result = get(server, tmp_path / "w")
    assert str(tmp_path) not in result.to_json()
    assert str(tmp_path) not in (tmp_path / "w" / "model.pth.json").read_text(encoding="utf-8")


def test_r20_the_signature_of_an_address_is_sent_and_never_kept(
    server: Server, tmp_path: Path, weights: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Meta's addresses are signed for the person who asked; one that was signed anew goes on with the same file."""
    first, second = (f"/dinov3.pth?id=7&Policy=p{n}&Signature=secret{n}&Key-Pair-Id=K{n}" for n in "12")
    server.files[first] = File(weights, breaks_at=5000)
    with pytest.raises(ResourceError) as broken:
        get(server, tmp_path / "w", first, "dinov3")
    assert "id=7&Policy=…" in broken.value.where
    part = (tmp_path / "w" / "dinov3.pth.part.json").read_text(encoding="utf-8")
    server.files[second] = File(weights)
    result = get(server, tmp_path / "w", second, "dinov3")
    assert server.log[-1][2]["Range"] == "bytes=5000-"
    kept = (tmp_path / "w" / "dinov3.pth.json").read_text(encoding="utf-8")
    told = [broken.value.where, part, kept, result.to_json(), caplog.text]
    assert not any("secret" in text or "K1" in text or "K2" in text for text in told)
    assert "id=7" in kept
