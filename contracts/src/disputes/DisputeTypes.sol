// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {JobSpec, Lease, Profile, Receipt} from "./Statements.sol";

enum State {
    None,
    Challenged,
    Drawn,
    Finished
}

enum Outcome {
    None,
    Slashed, // four of five beyond the profile, and the model has enough seasoned verifiers
    Restitution, // three beyond, or four where the model has too few
    Dismissed, // three within
    Inconclusive, // neither side has three: members were silent
    Withheld, // evidence was reported missing and not posted
    NotDrawn, // the challenger did not open its nonce in time
    NoPanel // five eligible verifiers were not found
}

enum Status {
    Drawn,
    ReportedMissing,
    Committed,
    Revealed
}

/// @notice One member of a panel.
struct Member {
    address operator;
    uint64 number; // as revealed; see docs/protocol.md for its unit
    Status status;
}

/// @notice All that is known of a dispute. Its id is the struct hash of the lease: one challenge per attempt, for ever.
struct Dispute {
    address challenger;
    uint96 bond; // base units
    address provider;
    uint96 locked; // base units of the provider's stake that this dispute holds
    address client;
    uint96 amount; // base units that the attempt could have earned
    address scheduler;
    uint64 bound; // largest number within the profile
    State state;
    Outcome outcome;
    bool slashable; // the model has enough seasoned verifiers
    bool posted; // evidence is on chain
    bytes32 model;
    bytes32 nonceCommit;
    uint64 issuedAt; // of the lease, unix seconds
    uint64 drawBlock; // its hash draws the panel
    uint32 poolSize; // length of the model's list at the challenge
    uint40 drawUntil; // unix seconds, like the next four; zero before they are known
    uint40 reportUntil;
    uint40 postUntil;
    uint40 commitUntil;
    uint40 revealUntil;
    uint8 missing; // reports that stand
    uint8 commits;
    uint8 reveals;
    Member[5] members;
    bytes32[5] commitments;
}

/// @notice What a challenger shows.
struct Claim {
    Lease lease;
    bytes leaseSignature; // the scheduler's, 65 bytes
    Receipt receipt;
    bytes receiptSignature; // the provider's
    JobSpec spec;
    Profile profile;
    bytes delegation; // empty when the caller is the client, else the client's signature over Delegation(lease, caller)
    bytes32 nonceCommit; // keccak256(abi.encode(id, caller, nonce)); the nonce stays secret until the draw
    bytes32 evidenceHash; // keccak256 of the bytes that the panel will get
}
