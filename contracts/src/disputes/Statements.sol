// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice The scheduler's term sheet of one attempt (core.terms.Lease, field by field).
struct Lease {
    bytes32 job;
    bytes32 spec;
    uint32 attempt;
    address client;
    address scheduler;
    address provider;
    bytes32 model;
    uint8 task;
    uint96 promptPricePerMtok;
    uint96 outputPricePerMtok;
    uint96 maximum;
    uint32 feePpm;
    bytes32 clientChannel;
    bytes32 providerChannel;
    bytes32 profile;
    uint32 windowUnits;
    uint32 prefixUnits;
    bytes32 prefixHash;
    uint64 issuedAt;
    uint64 deadline;
}

/// @notice What the client ordered (core.terms.JobSpec). The request appears as its salted hash only.
struct JobSpec {
    address client;
    address scheduler;
    bytes32 jobId;
    uint8 task;
    bytes32 model;
    bytes32 requestHash;
    uint32 promptUnits;
    uint32 maxOutputUnits;
    uint96 maxAmount;
    bytes32 constraintsHash;
    bytes32 profile;
    uint64 deadline;
}

/// @notice The provider's statement of what it did (core.terms.Receipt).
struct Receipt {
    bytes32 lease;
    bytes32 nonce;
    bytes32 requestHash;
    bytes32 outputHash;
    uint32 prefixUnits;
    bytes32 prefixHash;
    uint32 promptUnits;
    uint32 outputUnits;
    uint8 outcome;
    uint64 finishedAt;
}

/// @notice How a result is judged (core.terms.Profile); both sides named its hash before the run.
struct Profile {
    uint8 task;
    bytes32 dtypeHash;
    bytes32 runtimeHash;
    bytes32 providerGpuClassHash;
    bytes32 checkerGpuClassHash;
    uint64 maxAbsDiffNano;
    uint64 acceptMeanGapMicro;
    uint64 rejectMeanGapMicro;
    uint32 grossGapMilli;
    uint32 grossSharePpm;
    uint32 minUnits;
}

/// @title The market's signed statements as EIP-712 structs: the same type strings and hashes as gpumarket.core.terms
/// @notice Holds only if every hash equals Python's: tests/unit/test_contracts_disputes.py compares them.
library Statements {
    bytes32 internal constant LEASE_TYPEHASH = keccak256(
        "Lease(bytes32 job,bytes32 spec,uint32 attempt,address client,address scheduler,address provider,bytes32 model,uint8 task,uint96 promptPricePerMtok,uint96 outputPricePerMtok,uint96 maximum,uint32 feePpm,bytes32 clientChannel,bytes32 providerChannel,bytes32 profile,uint32 windowUnits,uint32 prefixUnits,bytes32 prefixHash,uint64 issuedAt,uint64 deadline)"
    );
    bytes32 internal constant SPEC_TYPEHASH = keccak256(
        "JobSpec(address client,address scheduler,bytes32 jobId,uint8 task,bytes32 model,bytes32 requestHash,uint32 promptUnits,uint32 maxOutputUnits,uint96 maxAmount,bytes32 constraintsHash,bytes32 profile,uint64 deadline)"
    );
    bytes32 internal constant RECEIPT_TYPEHASH = keccak256(
        "Receipt(bytes32 lease,bytes32 nonce,bytes32 requestHash,bytes32 outputHash,uint32 prefixUnits,bytes32 prefixHash,uint32 promptUnits,uint32 outputUnits,uint8 outcome,uint64 finishedAt)"
    );
    bytes32 internal constant PROFILE_TYPEHASH = keccak256(
        "Profile(uint8 task,bytes32 dtypeHash,bytes32 runtimeHash,bytes32 providerGpuClassHash,bytes32 checkerGpuClassHash,uint64 maxAbsDiffNano,uint64 acceptMeanGapMicro,uint64 rejectMeanGapMicro,uint32 grossGapMilli,uint32 grossSharePpm,uint32 minUnits)"
    );
    bytes32 internal constant DELEGATION_TYPEHASH = keccak256("Delegation(bytes32 lease,address challenger)");
    bytes32 private constant DOMAIN_TYPEHASH =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");

    /// @notice Task and outcome values, as in core.terms.
    uint8 internal constant TASK_GENERATE = 1;
    uint8 internal constant TASK_EMBED = 3;
    uint8 internal constant OUTCOME_COMPLETED = 1;

    uint256 private constant PER_MILLION = 1_000_000;

    function hash(Lease calldata lease) internal pure returns (bytes32) {
        return keccak256(abi.encode(LEASE_TYPEHASH, lease));
    }

    function hash(JobSpec calldata spec) internal pure returns (bytes32) {
        return keccak256(abi.encode(SPEC_TYPEHASH, spec));
    }

    function hash(Receipt calldata receipt) internal pure returns (bytes32) {
        return keccak256(abi.encode(RECEIPT_TYPEHASH, receipt));
    }

    function hash(Profile calldata profile) internal pure returns (bytes32) {
        return keccak256(abi.encode(PROFILE_TYPEHASH, profile));
    }

    /// @notice What a client signs to let somebody else challenge one lease.
    function hashDelegation(bytes32 lease, address challenger) internal pure returns (bytes32) {
        return keccak256(abi.encode(DELEGATION_TYPEHASH, lease, challenger));
    }

    /// @notice The market's domain separator: bound to this chain and to the StakeRegistry.
    function domainSeparator(address registry) internal view returns (bytes32) {
        return keccak256(
            abi.encode(DOMAIN_TYPEHASH, keccak256("gpumarket"), keccak256("1"), block.chainid, registry)
        );
    }

    /// @notice What the attempt could have earned, in base units, rounded down; never above the lease's maximum.
    /// @dev docs/protocol.md, "What is earned": GENERATE pays output units, and the prompt when it completed; EMBED pays input tokens.
    function amount(Lease calldata lease, Receipt calldata receipt) internal pure returns (uint96) {
        uint256 earned;
        if (lease.task == TASK_EMBED) {
            earned = uint256(receipt.outputUnits) * lease.promptPricePerMtok / PER_MILLION;
        } else {
            earned = uint256(receipt.outputUnits) * lease.outputPricePerMtok / PER_MILLION;
            if (receipt.outcome == OUTCOME_COMPLETED) {
                earned += uint256(receipt.promptUnits) * lease.promptPricePerMtok / PER_MILLION;
            }
        }
        return earned < lease.maximum ? uint96(earned) : lease.maximum;
    }

    /// @notice The largest number that a panel member may reveal without counting against the provider.
    function bound(Profile calldata profile) internal pure returns (uint64) {
        return profile.task == TASK_EMBED ? profile.maxAbsDiffNano : profile.grossSharePpm;
    }
}
