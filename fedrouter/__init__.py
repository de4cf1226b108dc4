"""FedRouter: one LoRA adapter per task, trained across clients, served behind one endpoint."""

__version__ = "0.1.0"
