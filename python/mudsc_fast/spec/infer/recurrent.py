"""Rules of recurrent layers: LSTM, GRU and RNN, and their cells.

The gates of a layer are blocks along the first axis of its weights, [gates * hidden, ...]. The hidden units move alike
in all gates, in the recurrent weights and in the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.infer import views
from mudsc_fast.spec.infer.factors import Factor, concatenation, freeze, split, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import rule
from mudsc_fast.spec.infer.views import View

_NUM_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@rule("lstm gru rnn_tanh rnn_relu")
def _recurrent(record: Record, call: Call) -> list[View]:
    packed = call.get("data") is not None
    *lead, inputs = record.read(call["data"] if packed else call["input"])
    time = 1 if len(lead) == 2 and call.get("batch_first") else 0
    freeze(lead[time], call)
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    directions = 2 if call["bidirectional"] else 1
    weights = call["params"]
    per_direction = len(weights) // (call["num_layers"] * directions)
    hidden_of: list[tuple[Factor, Factor]] = []
    for _ in range(call["num_layers"]):
        outputs = []
        for _ in range(directions):
            begin = len(hidden_of) * per_direction
            written = _direction(record, call, inputs, weights[begin : begin + per_direction])
            hidden_of.append(written)
            outputs.append(written[0])
        inputs = concatenation(outputs)
    result = record.result([*lead, inputs])
    batch = [] if packed or len(lead) < 2 else [lead[1 - time]]
    return [result, *(_final_state(record, state, hidden_of, i, batch) for i, state in enumerate(states))]


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def _cell(record: Record, call: Call) -> View | list[View]:
    *lead, inputs = record.read(call["input"])
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    weights = [call.get(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    hidden, _ = _direction(record, call, inputs, [weight for weight in weights if weight is not None])
    for state in states:
        for mine, other in zip([*lead, hidden], record.read(state), strict=True):
            unify(mine, other)
    results = [record.result([*lead, hidden]) for _ in states]
    return results if len(results) > 1 else results[0]


def _direction(record: Record, call: Call, inputs: Factor, weights: Sequence[View]) -> tuple[Factor, Factor]:
    """Follow one direction of one layer. Return the factors of its output and of its cell."""
    gates = _NUM_GATES[call.name.partition("_")[0]]
    projection = None
    if len(weights) in (3, 5):  # an LSTM with `proj_size`
        *weights, projection = weights
    input_weight, recurrent_weight, *biases = weights
    rows, columns = record.read(input_weight, [1])
    unify(columns, inputs)
    cell = _units_of_gates(call, rows, gates)
    rows, columns = record.read(recurrent_weight, [1])
    unify(_units_of_gates(call, rows, gates), cell)
    for bias in biases:
        unify(_units_of_gates(call, record.read(bias)[0], gates), cell)
    output = cell
    if projection is not None:
        output, consumed = record.read(projection, [1])
        unify(consumed, cell)
    unify(columns, output)
    return output, cell


def _units_of_gates(call: Call, rows: Factor, gates: int) -> Factor:
    order, units = split(rows, gates)
    freeze(order, call)
    return units


def _final_state(
    record: Record, initial: View, hidden_of: Sequence[tuple[Factor, Factor]], kind: int, batch: Sequence[Factor]
) -> View:
    """Return the final state [layers * directions, ..., units], which has the axes of the initial state.

    It is a view of the concatenation of all layers, so that one layer can be selected from it.
    """
    units = [written[kind] for written in hidden_of]
    lead: list[Factor] = list(batch)
    for place, factor in enumerate(units):
        *others, own = record.read(views.select(initial, 0, place))
        unify(own, factor)
        for position, other in enumerate(others):
            if position < len(lead):
                unify(lead[position], other)
            else:
                lead.append(other)
    size = units[0].size
    joined = record.result([*lead, concatenation(units)])
    apart = views.reshape(joined, [*(factor.size for factor in lead), len(units), size])
    return views.permute(apart, [len(lead), *range(len(lead)), len(lead) + 1])
