"""`dpsink train · evaluate · sample · budget · audit`: one trial, from a shell."""

from dpsink import console
from dpsink.commands import audit, budget, evaluate, sample, train

app = console.new_app("dpsink", "Train, evaluate and sample one differentially private generator.")

for command in (train.train, evaluate.evaluate, sample.sample, budget.budget, audit.audit):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


if __name__ == "__main__":
    main()
