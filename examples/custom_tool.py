"""A tool of your own: generated code asks a database that only the host can open.

The database stays on the host. The sandbox sees a plain function, ``orders_of``, with your signature and
docstring; each call runs here, and an exception raised here is raised there.

    python examples/custom_tool.py [--scripted]
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from typing import Any

import dspy

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model

ORDERS = [("Ada", "paper", 12.50), ("Ada", "ink", 30.00), ("Grace", "cable", 7.25), ("Grace", "tape", 2.75)]
CUSTOMERS = ["Ada", "Grace", "Nobody"]


def main(argv: Sequence[str] | None = None) -> int:
    """Ask who spent how much and print the answer."""
    arguments = sys.argv[1:] if argv is None else argv
    with example_model(SCRIPT, only_scripted="--scripted" in arguments):
        rlm = dspy.RLM(
            "customers: list[str], question: str -> spent: dict[str, float]",
            tools=[make_tool(ORDERS)],
            interpreter_factory=SandboxInterpreter.factory(),
        )
        result = rlm(customers=CUSTOMERS, question="How much did each customer spend? Leave out unknown ones.")
    for name, amount in result.spent.items():
        print(f"{name:<8} {amount:8.2f}")
    return 0


def make_tool(orders: Sequence[tuple[str, str, float]]) -> Any:
    """Return the tool; it closes over the data, which therefore never enters the sandbox."""

    def orders_of(customer: str) -> list[dict[str, Any]]:
        """Return the orders of one customer as dicts with `item` and `price`; KeyError for an unknown one."""
        # A connection per call: tools run on several threads.
        with sqlite3.connect(":memory:") as database:
            database.execute("CREATE TABLE orders (customer TEXT, item TEXT, price REAL)")
            database.executemany("INSERT INTO orders VALUES (?, ?, ?)", orders)
            # Generated code chose this text: a parameter, never a piece of SQL.
            rows = database.execute("SELECT item, price FROM orders WHERE customer = ?", (customer,)).fetchall()
        if not rows:
            raise KeyError(customer)
        return [{"item": item, "price": price} for item, price in rows]

    return orders_of


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        ("I look at one customer first.", "print(orders_of(customers[0]))"),
        (
            "Now all of them. An unknown one raises KeyError, which I can catch.",
            """
spent = {}
for name in customers:
    try:
        spent[name] = sum(order["price"] for order in orders_of(name))
    except KeyError as error:
        print("unknown:", error)
print(spent)
""",
        ),
        ("Complete.", "SUBMIT(spent=spent)"),
    ]
)

if __name__ == "__main__":
    sys.exit(main())
