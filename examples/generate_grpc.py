"""Text from a scheduler with nothing but the `trivium.v1` stubs: python examples/generate_grpc.py ADDRESS PROMPT"""

import sys

import grpc

from trivium.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2


def main(address: str, text: str) -> None:
    prompt = types_pb2.Prompt(single=types_pb2.SingletonPrompt(text=types_pb2.TextPrompt(text=text)))
    sampling = types_pb2.SamplingParams(temperature=0, max_tokens=40)
    request = scheduler_pb2.GenerateRequest(prompt=prompt, sampling=sampling, stream=True)
    with grpc.insecure_channel(address) as channel:
        for response in scheduler_pb2_grpc.SchedulerStub(channel).Generate(request):
            print(response.delta.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
