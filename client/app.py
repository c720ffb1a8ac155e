"""The same door for a stock `flower-supernode`: an ordinary ClientApp that carries to the trainer."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.door import Door
from strategies.letter import Answer, Call

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Carry a call to the trainer whose socket the node's own configuration names (`socket="…"`)."""
    try:
        call = Call.from_content(message.content)
        answer = Door(Path(str(context.node_config["socket"]))).ask(call).answer
    except Exception:  # noqa: BLE001  Flower would send its text to the coordinator
        answer = Answer("payload", "")
    return Message(answer.to_content(), reply_to=message)
