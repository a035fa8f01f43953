"""The namespace of this package's operators in torch: the package's own name, so that a renamed copy has its own."""

NAMESPACE: str = __name__.rsplit(".", 2)[0].replace(".", "_")
