"""The product's coordinator, where the toys are installed."""

from server.coordinator import main
from tasks import TASKS
from tests.toys import TOYS

if __name__ == "__main__":
    TASKS._entries.update(TOYS)
    main(preload=())
