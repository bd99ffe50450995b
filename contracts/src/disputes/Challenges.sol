// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {DisputeBook} from "./DisputeBook.sol";
import {Claim, Dispute, State} from "./DisputeTypes.sol";
import {JobSpec, Lease, Profile, Receipt, Statements} from "./Statements.sol";

/// @title Challenges: who may challenge what, and what both sides put in
/// @notice A challenge opens only on statements that scheduler and provider signed, by the client that they name or its delegate.
abstract contract Challenges is DisputeBook {
    /// @notice Challenges one attempt. Takes the bond and locks the provider's stake; see `quote` for both.
    /// @return id The lease's struct hash.
    function challenge(Claim calldata claim) external nonReentrant returns (bytes32 id) {
        id = Statements.hash(claim.lease);
        Dispute storage d = _disputes[id];
        if (d.state != State.None) revert AlreadyDisputed(id);
        uint256 until = uint256(claim.lease.issuedAt) + _challengeSeconds;
        if (block.timestamp < claim.lease.issuedAt || block.timestamp >= until) {
            revert OutsideChallengeTime(claim.lease.issuedAt, until);
        }
        _checkStatements(id, claim);
        _checkSignatures(id, claim);
        _open(d, claim);
        (d.locked, d.bond) = _stakes(claim.lease.provider, d.amount);
        _drawBegins(claim.lease.model);
        _emitChallenged(id, d, claim);
        registry.lock(d.provider, d.locked);
        _pull(d.bond);
    }

    /// @notice What a challenge of an attempt worth `amount` would lock of a provider's stake now, and the bond that it would take.
    function quote(address provider, uint96 amount) external view returns (uint96 locked, uint96 bond) {
        return _stakes(provider, amount);
    }

    // ------------------------------------------------------------------ private

    function _checkStatements(bytes32 id, Claim calldata claim) private pure {
        (Lease calldata lease, Receipt calldata receipt) = (claim.lease, claim.receipt);
        (JobSpec calldata spec, Profile calldata profile) = (claim.spec, claim.profile);
        if (Statements.hash(spec) != lease.spec) revert StatementMismatch("lease.spec");
        if (spec.client != lease.client) revert StatementMismatch("spec.client");
        if (spec.scheduler != lease.scheduler) revert StatementMismatch("spec.scheduler");
        if (spec.task != lease.task) revert StatementMismatch("spec.task");
        if (spec.model != lease.model) revert StatementMismatch("spec.model");
        if (spec.profile != lease.profile) revert StatementMismatch("spec.profile");
        if (lease.issuedAt > lease.deadline) revert StatementMismatch("lease.deadline");
        if (Statements.hash(profile) != lease.profile) revert StatementMismatch("lease.profile");
        if (profile.task != lease.task) revert StatementMismatch("profile.task");
        if (receipt.lease != id) revert StatementMismatch("receipt.lease");
        if (receipt.requestHash != spec.requestHash) revert StatementMismatch("receipt.requestHash");
        if (receipt.prefixUnits != lease.prefixUnits) revert StatementMismatch("receipt.prefixUnits");
        if (receipt.prefixHash != lease.prefixHash) revert StatementMismatch("receipt.prefixHash");
        if (lease.task != Statements.TASK_GENERATE && lease.task != Statements.TASK_EMBED) {
            revert TaskNotDisputable(lease.task);
        }
        uint32 least = lease.task == Statements.TASK_GENERATE && profile.minUnits > 1 ? profile.minUnits : 1;
        if (receipt.outputUnits < least) revert ResultTooShort(receipt.outputUnits, least);
    }

    function _checkSignatures(bytes32 id, Claim calldata claim) private view {
        bytes32 domain = Statements.domainSeparator(address(registry));
        _checkSigner(domain, id, claim.leaseSignature, claim.lease.scheduler);
        _checkSigner(domain, Statements.hash(claim.receipt), claim.receiptSignature, claim.lease.provider);
        if (msg.sender == claim.lease.client) return;
        if (claim.delegation.length == 0) revert NotHolder(id, msg.sender);
        _checkSigner(domain, Statements.hashDelegation(id, msg.sender), claim.delegation, claim.lease.client);
    }

    function _checkSigner(bytes32 domain, bytes32 statement, bytes calldata signature, address expected)
        private
        pure
    {
        address actual = ECDSA.recoverCalldata(MessageHashUtils.toTypedDataHash(domain, statement), signature);
        if (actual != expected) revert WrongSigner(statement, expected, actual);
    }

    function _open(Dispute storage d, Claim calldata claim) private {
        Lease calldata lease = claim.lease;
        uint256 seasoned = seasonedCount(lease.model, lease.issuedAt);
        if (seasoned < PANEL_SIZE) revert TooFewVerifiers(lease.model, seasoned);
        (d.challenger, d.provider, d.client, d.scheduler) =
            (msg.sender, lease.provider, lease.client, lease.scheduler);
        (d.amount, d.bound) = (Statements.amount(lease, claim.receipt), Statements.bound(claim.profile));
        (d.state, d.slashable) = (State.Challenged, seasoned >= _slashVerifiersMin);
        (d.model, d.nonceCommit, d.issuedAt) = (lease.model, claim.nonceCommit, lease.issuedAt);
        d.poolSize = uint32(verifierCount(lease.model));
        d.drawBlock = uint64(block.number) + _drawDelayBlocks;
        d.drawUntil = uint40(block.timestamp) + _drawSeconds;
    }

    function _emitChallenged(bytes32 id, Dispute storage d, Claim calldata claim) private {
        emit Challenged(
            id,
            d.provider,
            msg.sender,
            claim.lease.model,
            claim.lease.task,
            d.bound,
            d.amount,
            d.locked,
            d.bond,
            d.drawBlock,
            d.drawUntil,
            d.slashable,
            claim.evidenceHash
        );
    }

    function _stakes(address provider, uint96 amount) private view returns (uint96 locked, uint96 bond) {
        uint256 free = registry.lockable(provider);
        if (free < _lockMinimum) revert StakeTooSmall(provider, free);
        locked = uint96(Math.min(free, Math.max(_lockMinimum, uint256(amount) * _slashMultiple)));
        uint256 part = uint256(locked) * _bondPpm + Math.min(amount, locked) * _amountBondPpm;
        bond = uint96(Math.max(_bondMinimum, Math.ceilDiv(part, PPM)));
    }
}
