"""A real S3 store for tests: Ceph's gateway with one monitor and one disk in a folder, on 127.0.0.1 only.

Debian's Ceph survives `kill -9`. Its daemons authenticate by keys that Ceph creates in that folder, which only the
owner can open; the keys of S3 are in Ceph's own database.
"""

import json
import shutil
import zlib
from functools import partial
from pathlib import Path
from uuid import NAMESPACE_URL, uuid4, uuid5

from flows.net import answers
from flows.platform.process import HOST, Service, ServiceError, listens
from tests.services.tools import run_tool

PACKAGES = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "radosgw": "radosgw", "ceph": "ceph-common"}
USER = "vectorclm"
SHARE = 0.8  # the store's largest share of the free disk; it grows with its objects
CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
}
QUIET = ("rocksdb", "rgw", "rgw_access", "mon", "osd", "bluestore", "bluefs", "bdev", "ms")
CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = [v2:{host}:{port}/0]
public_addr = {host}
cluster_addr = {host}
keyring = {folder}/keyring
admin_socket =
pid_file =
run_dir = {folder}
log_file =
log_to_stderr = true
err_to_stderr = true
mon_cluster_log_to_file = false
mon_data = {folder}/mon
mon_data_avail_crit = 1
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_max_pg_per_osd = 1000
osd_data = {folder}/osd
osd_objectstore = bluestore
osd_memory_target = 1073741824
osd_crush_chooseleaf_type = 0
osd_crush_initial_weight = 1
osd_pool_default_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
bluestore_block_size = {size}
rgw_rados_pool_pg_num_min = 4
rgw_data = {folder}/gateway
rgw_enable_usage_log = false
rgw_enable_ops_log = false
"""


def object_store(folder: Path, logs: Path, port: int, access_key: str, secret_key: str) -> list[Service]:
    """Ceph's three daemons as services, in the order of their start; the first start creates them at `folder`."""
    ceph = ["-c", str(folder / "ceph.conf")]
    frontend = f"beast endpoint={HOST}:{port}"
    keys = {"access_key": access_key, "secret_key": secret_key}
    return [
        Service(
            "s3-monitor",
            ["ceph-mon", *ceph, "-f", "-i", "a"],
            {},
            logs,
            ready=lambda: listens(_monitor_port(folder)),
            prepare=partial(_make_monitor, folder),
        ),
        Service(
            "s3-disk",
            ["ceph-osd", *ceph, "-f", "-i", "0"],
            {},
            logs,
            ready=partial(_disk_is_up, ceph),
            prepare=partial(_make_disk, folder, ceph),
        ),
        Service(
            "s3-gateway",
            ["radosgw", *ceph, "-f", "-n", "client.admin", "--rgw-frontends", frontend],
            {},
            logs,
            port,
            ready=partial(answers, f"http://{HOST}:{port}"),
            prepare=partial(_make_user, ceph, keys),
        ),
    ]


def _monitor_port(folder: Path) -> int:
    hosts = next(line for line in (folder / "ceph.conf").read_text().splitlines() if line.startswith("mon_host"))
    return int(hosts.rpartition(":")[2].partition("/")[0])


def _make_monitor(folder: Path) -> None:
    """Create Ceph's configuration, keys and first map. Raises ServiceError where a package is missing."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        install = "apt-get install --no-install-recommends " + " ".join(missing)
        raise ServiceError(f"packages of Ceph, which is the S3 store here, are missing: {install}")
    if folder.exists():
        return
    fsid, part = str(uuid4()), folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700, parents=True)
    size = int(shutil.disk_usage(part).free * SHARE) // 2**20 * 2**20
    port = _free_port(folder)
    text = CONFIGURATION.format(fsid=fsid, host=HOST, port=port, folder=folder, size=size)
    (part / "ceph.conf").write_text(text + "".join(f"debug_{name} = 0/0\n" for name in QUIET), encoding="utf-8")
    keyring, first_map = str(part / "keyring"), str(part / "monmap")
    for number, (name, allowed) in enumerate(CAPABILITIES.items()):
        caps = [word for daemon, cap in allowed.items() for word in ("--cap", daemon, cap)]
        create = [] if number else ["--create-keyring"]
        run_tool(["ceph-authtool", *create, keyring, "--gen-key", "-n", name, *caps], "making Ceph's keys")
    address = f"[v2:{HOST}:{port}/0]"
    run_tool(["monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, first_map], "making Ceph's map")
    make = ["ceph-mon", "-c", str(part / "ceph.conf"), "-i", "a", "--mkfs", "--mon-data", str(part / "mon")]
    run_tool([*make, "--monmap", first_map, "--keyring", keyring], "making Ceph's monitor")
    part.rename(folder)


def _free_port(folder: Path) -> int:
    """A fixed port for the monitor, chosen by the folder's name, below the ports of outgoing connections."""
    first = 10_000 + zlib.crc32(str(folder).encode()) % 20_000
    return next(port for port in range(first, first + 100) if not listens(port))


def _make_disk(folder: Path, ceph: list[str]) -> None:
    disk = folder / "osd"
    if (disk / "ready").exists():  # the file that Ceph writes last on a new disk
        return
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    identity = str(
        uuid5(NAMESPACE_URL, (folder / "ceph.conf").read_text(encoding="utf-8"))
    )  # the same id if repeated, so it stays one disk
    run_tool(["ceph", *ceph, "--connect-timeout", "60", "osd", "new", identity], "naming Ceph's disk")
    run_tool(["ceph-osd", *ceph, "-i", "0", "--mkfs", "--osd-uuid", identity], "making Ceph's disk")


def _disk_is_up(ceph: list[str]) -> bool:
    found = run_tool(["ceph", *ceph, "--connect-timeout", "30", "osd", "stat", "-f", "json"], "asking for Ceph's disk")
    return bool(json.loads(found)["num_up_osds"])


def _make_user(ceph: list[str], keys: dict[str, str]) -> None:
    """Set the gateway's keys by standard input, as arguments are visible to all users."""
    admin = ["radosgw-admin", *ceph, "-n", "client.admin"]
    known = json.loads(run_tool([*admin, "metadata", "list", "user"], "asking Ceph for its users"))
    if USER in known:
        user = json.loads(run_tool([*admin, "metadata", "get", f"user:{USER}"], "asking Ceph for its user"))["data"]
        if [{name: key[name] for name in keys} for key in user["keys"]] == [keys]:
            return
    wanted = {"user_id": USER, "display_name": USER, "type": "rgw", "op_mask": "read, write, delete"}
    data = {**wanted, "max_buckets": 1000, "keys": [{"user": USER, **keys}]}
    document = json.dumps({"key": f"user:{USER}", "data": data})
    run_tool([*admin, "metadata", "put", f"user:{USER}"], "giving Ceph's user its keys", secret_input=document)
