"""The load benchmark of the webhook receiver runs to its end in small: none lost, none doubled; its figures are a machine's."""

import subprocess
import sys
from pathlib import Path


def test_webhook_load() -> None:
    command = [sys.executable, str(Path(__file__).with_name("webhook_load.py")), "--quick", "--hooks", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sent 100 deliveries at 50/s over 2 hooks, 2 of them twice" in result.stdout
    assert "accepted 102 of 102" in result.stdout
    assert "lost 0, doubled 0" in result.stdout
