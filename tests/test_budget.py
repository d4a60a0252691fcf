import pytest
import torch

from fdm_cli.budget import available, parse_size
from fdm_cli.errors import BadInput

CPU = torch.device("cpu")
MEMINFO = "MemTotal:  16000000 kB\nMemFree:  1000000 kB\nMemAvailable:  8000000 kB\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16_000_000_000),
        ("14.5 GiB", 15_569_256_448),
        ("800mb", 800_000_000),
        ("1 KiB", 1024),
        ("2KB", 2000),
        (" 3 MiB ", 3 * 2**20),
        ("7B", 7),
        ("0.5TB", 500_000_000_000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "16", "GB", "-1GB", "16 GBs", "1e9B", "nanGB", "0GB", "0.2B", "9" * 40 + "GB", "1,5GB"]
)
def test_bad_sizes_name_the_units(text):
    with pytest.raises(BadInput) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message
    assert "16GB" in caught.value.hint


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_without_a_limit_the_machine_s_available_memory_counts(tmp_path):
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/user.slice\n",
            "sys/fs/cgroup/user.slice/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.current": "123\n",
            "sys/fs/cgroup/user.slice/memory.stat": "inactive_file 0\n",
        },
    )
    budget = available(CPU, tmp_path)
    assert budget.size == 8_000_000 * 1024
    assert "RAM" in budget.source


def test_the_tightest_version_2_group_counts_and_droppable_file_pages_are_free(tmp_path):
    group = "sys/fs/cgroup/outer"
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{group}/inner/memory.max": "max\n",
            f"{group}/memory.max": "3000000000\n",
            f"{group}/memory.current": "1500000000\n",
            f"{group}/memory.stat": "anon 1000000000\ninactive_file 500000000\n",
        },
    )
    budget = available(CPU, tmp_path)
    assert budget.size == 2_000_000_000
    assert "container" in budget.source


def test_a_version_1_group_and_one_without_a_limit(tmp_path):
    group = "sys/fs/cgroup/memory"
    stat = "inactive_file 1\ntotal_inactive_file 200000000\n"
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            f"{group}/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            f"{group}/memory.usage_in_bytes": "5000000000\n",
            f"{group}/memory.stat": stat,
            f"{group}/docker/abc/memory.limit_in_bytes": "1000000000\n",
            f"{group}/docker/abc/memory.usage_in_bytes": "900000000\n",
            f"{group}/docker/abc/memory.stat": stat,
        },
    )
    assert available(CPU, tmp_path).size == 300_000_000


def test_inside_a_container_the_path_leads_nowhere_and_the_mount_s_top_counts(tmp_path):
    write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/../../somewhere/else\n",
            "sys/fs/cgroup/memory.max": "1000000\n",
            "sys/fs/cgroup/memory.current": "2000000\n",
            "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
        },
    )
    assert available(CPU, tmp_path).size == 0  # over the limit already


def test_processes_of_one_machine_share_it(tmp_path, monkeypatch):
    write(tmp_path, {"proc/meminfo": MEMINFO})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    budget = available(CPU, tmp_path)
    assert budget.size == 2_000_000 * 1024
    assert "shared by 4" in budget.source


def test_a_system_that_does_not_say(tmp_path):
    assert available(CPU, tmp_path) is None
    write(tmp_path, {"proc/meminfo": "garbage\n", "proc/self/cgroup": "garbage\n"})
    assert available(CPU, tmp_path) is None


def test_this_machine_says():
    assert available(CPU).size > 0
