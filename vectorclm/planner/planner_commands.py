"""`vectorclm estimate` and `vectorclm simulate`: what a training costs, and what limits it, on machines not at hand.

The commands import what they run: their help waits for neither torch nor Arrow.
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vectorclm.command_line import Json, Setting, new_app, print_table, table
from vectorclm.config import ExperimentConfig, load_experiment, override
from vectorclm.errors import ConfigError

if TYPE_CHECKING:
    from vectorclm.planner.hardware import Device, Network
    from vectorclm.planner.plan import TrainingPlan

CPU = "cpu"
planners = new_app("planners", "Trainings on machines not at hand: estimate, simulate.")


@Parameter(name="*")
@dataclass(frozen=True)
class ClusterOptions:
    """Options that describe a cluster."""

    device: Annotated[str, Parameter(help="h200, h100, b200, a100, l40s, rtx4090, or cpu: measured here")] = "h200"
    gpus_per_node: Annotated[int, Parameter(help="Devices, and so ranks, of a node")] = 8
    network: Annotated[str, Parameter(help="Bits a second of a node's network, as in 100G")] = "100G"
    rdma: Annotated[bool, Parameter(help="The network is InfiniBand or RoCE, not Ethernet through sockets")] = False
    settings: Setting = ()

    def load(self, experiment: str) -> "tuple[ExperimentConfig, Device, Network]":
        """The experiment with its changes, and the devices and network. Raises ConfigError for an unknown device."""
        from vectorclm.planner.hardware import DEVICES, network, parse_bits

        found = override(load_experiment(experiment)[0], self.settings)
        if self.gpus_per_node < 1:
            raise ConfigError(f"gpus-per-node is {self.gpus_per_node}: a node has at least one")
        bits = parse_bits(self.network)
        name = self.device.lower().replace(" ", "").replace("-", "")
        if name == CPU:
            return found, _measured(found), network(bits, rdma=self.rdma)
        if name not in DEVICES:
            known = ", ".join(key for key, device in DEVICES.items() if device.kind == "cuda")
            raise ConfigError(f"the planner knows no device {self.device!r}: choose {known}, or {CPU}")
        return found, DEVICES[name], network(bits, rdma=self.rdma)


def _measured(experiment: ExperimentConfig) -> "Device":
    from vectorclm.memory_plan import TrainingShape
    from vectorclm.planner.measurement import measure_cpu

    return measure_cpu(TrainingShape(experiment.model, experiment.shards.sequence_length, "cpu"))


@planners.command(help_epilogue="Example: vectorclm estimate base --nodes 2 --network 100G --price 3.50")
def estimate(
    experiment: Annotated[str, Parameter(help="tiny, small, base, or a TOML file")],
    /,
    *,
    cluster: ClusterOptions = ClusterOptions(),
    nodes: Annotated[int, Parameter(help="Nodes that train together")] = 1,
    price: Annotated[float | None, Parameter(help="Price of a device for an hour")] = None,
    store_rate: Annotated[float | None, Parameter(help="MB a second that the store gives to all ranks")] = None,
    json_: Json = False,
) -> None:
    """Estimate a pretraining on a cluster: time of a step, hours, cost, memory, traffic, and what is wrong with it.

    The figures follow from single kernels and links, and from published data sheets. No device is needed.
    """
    from vectorclm.planner.hardware import Cluster
    from vectorclm.planner.plan import STORE_BYTES, Prices, plan_training

    if nodes < 1:
        raise ConfigError(f"nodes is {nodes}: a training has at least one")
    found, device, link = cluster.load(experiment)
    prices = Prices(price, STORE_BYTES if store_rate is None else 1e6 * store_rate)
    plan = plan_training(found, Cluster(device, nodes, cluster.gpus_per_node, link), prices)
    if json_:
        print(json.dumps({"experiment": found.name, **plan.as_json()}))
        return
    for line in explanation(found.name, plan):
        print(line)


def explanation(name: str, plan: "TrainingPlan") -> list[str]:
    """A plan in lines for a person."""
    step, memory, cluster = plan.step, plan.step.plan, plan.cluster
    again = ", activation checkpointing" if memory.activation_checkpointing else ""
    cost = "" if plan.cost is None else f", cost {plan.cost:,.2f}"
    return [
        f"{name} on {cluster.nodes} x {cluster.per_node} {cluster.device.name}",
        f"step        {1e3 * step.seconds:,.1f} ms: compute {1e3 * step.compute:,.1f}, gradients "
        f"{1e3 * step.gradients:,.1f}, Muon {1e3 * step.muon:,.1f}",
        f"speed       {plan.tokens_per_second:,.0f} tokens a second, efficiency {plan.efficiency:.2f}",
        f"time        {plan.hours:,.2f} hours for {plan.work.steps:,} steps, validations and samples, "
        f"{plan.hours * cluster.ranks:,.1f} device hours{cost}",
        f"store       {plan.store_bytes / 1e6:,.0f} MB a second",
        f"memory      {memory.bytes / 1e9:,.1f} of {cluster.device.memory / 1e9:,.0f} GB: {memory.windows} windows at "
        f"once{again}",
        f"checkpoint  {plan.checkpoint / 1e9:,.2f} GB, best every {plan.checkpoint_seconds / 60:,.0f} minutes "
        f"({plan.checkpoint_steps:,} steps)",
        *(f"warning: {warning}" for warning in plan.warnings),
    ]


@planners.command(help_epilogue="Example: vectorclm simulate base --device h200 --network 100G")
def simulate(
    experiment: Annotated[str, Parameter(help="tiny, small, base, or a TOML file")],
    /,
    *,
    cluster: ClusterOptions = ClusterOptions(),
    json_: Json = False,
) -> None:
    """Simulate a pretraining on 1 to 4,096 ranks: what each reads and fetches, what waits, what interruptions cost.

    Counts with the order and the division of the training itself; nothing is trained.
    """
    from vectorclm.planner.simulation import RANKS, Simulation

    found, device, link = cluster.load(experiment)
    simulation = Simulation(found, device, cluster.gpus_per_node, link)
    counts, limits = [simulation.at(ranks) for ranks in RANKS], simulation.limits()
    if json_:
        print(json.dumps({"experiment": found.name, "ranks": [asdict(each) for each in counts], "limits": limits}))
        return
    columns = ("ranks >", "windows >", "waiting >", "Newton-Schulz waits >", "step, ms >", "read, MB/s >")
    shown = table(*columns, "fetched, GB >", "at resume, GB >", "lost >")
    for each in counts:
        shown.add_row(
            f"{each.ranks:,}",
            str(each.most_windows),
            f"{each.waiting:.0%}",
            f"{each.muon_waiting:.0%}",
            f"{1e3 * each.step_seconds:,.1f}",
            f"{each.read_bytes_per_second / 1e6:,.0f}",
            f"{each.fetched_bytes / 1e9:,.1f}",
            f"{each.resume_bytes / 1e9:,.1f}",
            f"{each.lost:.2%}",
        )
    print_table(shown)
    for name, ranks in limits.items():
        print(f"{name}: {'not up to 4,096 ranks' if ranks is None else f'from {ranks:,} ranks'}")
