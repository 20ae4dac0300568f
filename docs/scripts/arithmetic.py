"""Print conversations about the sums of small numbers, one JSON document per line, for the chat guide."""

from __future__ import annotations

import json
import random

numbers = [(a, b) for a in range(1, 16) for b in range(1, 16)]
random.Random(1).shuffle(numbers)
for a, b in numbers:
    messages = [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"{a} + {b} is {a + b}."}]
    print(json.dumps({"messages": messages}))
