"""What SGLang's wheel lacks on a CPU."""
