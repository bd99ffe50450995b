// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {BlockHashes} from "./disputes/BlockHashes.sol";
import {Challenges} from "./disputes/Challenges.sol";
import {DisputeTerms, Terms} from "./disputes/DisputeTerms.sol";
import {Dispute, Member, Outcome, State, Status} from "./disputes/DisputeTypes.sol";
import {IStakeRegistry} from "./disputes/IStakeRegistry.sol";
import {Payouts, Split} from "./disputes/Payouts.sol";
import {VerifierSeats} from "./disputes/VerifierSeats.sol";

/// @title Disputes: cheating is punished by a drawn panel, and by nobody else
/// @notice A client that holds the openings of a leased attempt challenges it with a bond; five verifiers, drawn by a nonce that it
/// committed and a later block's hash, recompute the work and reveal one number each; the contract counts the numbers beyond the lease's own
/// profile. Prompts never come here: the chain sees signed hashes, the panel sees the openings.
///
/// What holds, whatever anyone does:
/// - every state has an exit by time that anyone can take: no dispute hangs, no stake stays locked;
/// - a verdict takes at most what its own challenge locked, and what is not taken is unlocked;
/// - at least half of whatever leaves a provider's stake is burned, so nobody gains by being slashed;
/// - tokens held = credited balances + bonds of unfinished disputes + what waits to be burned;
/// - nobody is privileged: no owner, no pause, no parameter that changes.
contract Disputes is Challenges {
    /// @param registry_ The registry, deployed with this contract's address as its `disputes`.
    /// @param terms_ See `Terms` and PROPERTIES.md.
    constructor(IStakeRegistry registry_, Terms memory terms_)
        DisputeTerms(registry_, terms_)
        VerifierSeats(registry_)
    {
        if (registry_.disputes() != address(this)) revert WrongRegistry(address(registry_));
        token = registry_.token();
    }

    // ------------------------------------------------------------------ draw

    /// @notice Opens the challenger's nonce and draws the panel. The nonce is the permission.
    function draw(bytes32 id, bytes32 nonce) external nonReentrant {
        Dispute storage d = _in(id, State.Challenged);
        if (block.number <= d.drawBlock) revert TooEarly(id, d.drawBlock);
        if (block.timestamp >= d.drawUntil) revert TooLate(id, d.drawUntil);
        if (keccak256(abi.encode(id, d.challenger, nonce)) != d.nonceCommit) revert WrongNonce(id);
        bytes32 blockHash = BlockHashes.get(d.drawBlock);
        if (blockHash == 0) revert BlockHashGone(id, d.drawBlock);
        _drawEnded(d.model);
        (address[5] memory panel, uint256 found) = _drawPanel(
            d.model, keccak256(abi.encode(nonce, blockHash)), d.poolSize, d.issuedAt, _parties(d)
        );
        if (found < PANEL_SIZE) {
            _credit(d.challenger, id, d.bond);
            return _end(id, d, Outcome.NoPanel, 0, 0, 0, 0);
        }
        _seatPanel(id, d, panel);
    }

    // ------------------------------------------------------------------ evidence

    /// @notice A member says that the challenger has not given it the evidence.
    function reportMissing(bytes32 id) external {
        Dispute storage d = _in(id, State.Drawn);
        Member storage member = d.members[_seatOf(id, d)];
        if (block.timestamp >= d.reportUntil) revert TooLate(id, d.reportUntil);
        if (member.status != Status.Drawn) revert AlreadyDone(id, msg.sender);
        member.status = Status.ReportedMissing;
        ++d.missing;
        emit EvidenceMissing(id, msg.sender);
    }

    /// @notice The challenger publishes the evidence, encrypted to the members' evidence keys. Bytes that members cannot open, or that are
    /// not what `evidenceHash` names, show nothing: members then reveal 0.
    function postEvidence(bytes32 id, bytes calldata evidence) external {
        Dispute storage d = _in(id, State.Drawn);
        if (msg.sender != d.challenger) revert NotChallenger(id, msg.sender);
        if (d.missing == 0) revert NothingMissing(id);
        if (evidence.length == 0) revert NoEvidence();
        if (block.timestamp >= d.postUntil) revert TooLate(id, d.postUntil);
        d.posted = true;
        emit EvidencePosted(id, evidence);
    }

    // ------------------------------------------------------------------ numbers

    /// @notice A member binds itself to its number; see `commitmentOf`. A report of missing evidence is thereby taken back.
    function commit(bytes32 id, bytes32 commitment) external {
        Dispute storage d = _in(id, State.Drawn);
        uint256 place = _seatOf(id, d);
        Member storage member = d.members[place];
        if (block.timestamp >= d.commitUntil) revert TooLate(id, d.commitUntil);
        if (_overdue(d)) revert EvidenceOverdue(id);
        if (commitment == 0) revert InvalidCommitment();
        if (member.status > Status.ReportedMissing) revert AlreadyDone(id, msg.sender);
        if (member.status == Status.ReportedMissing) --d.missing;
        member.status = Status.Committed;
        d.commitments[place] = commitment;
        emit Committed(id, msg.sender, commitment);
        if (++d.commits == PANEL_SIZE) {
            d.commitUntil = uint40(block.timestamp);
            d.revealUntil = uint40(block.timestamp) + _revealSeconds;
            emit RevealOpened(id, d.revealUntil);
        }
    }

    /// @notice A member opens its commitment.
    function reveal(bytes32 id, uint64 number, bytes32 salt) external {
        Dispute storage d = _in(id, State.Drawn);
        uint256 place = _seatOf(id, d);
        Member storage member = d.members[place];
        if (block.timestamp < d.commitUntil) revert TooEarly(id, d.commitUntil);
        if (block.timestamp >= d.revealUntil) revert TooLate(id, d.revealUntil);
        if (member.status == Status.Revealed) revert AlreadyDone(id, msg.sender);
        if (d.commitments[place] != commitmentOf(id, msg.sender, number, salt)) revert WrongReveal(id, msg.sender);
        (member.status, member.number) = (Status.Revealed, number);
        ++d.reveals;
        emit Revealed(id, msg.sender, number);
    }

    // ------------------------------------------------------------------ ending

    /// @notice Ends a dispute whose time has come; anyone may call it.
    function finish(bytes32 id) external nonReentrant {
        Dispute storage d = _disputes[id];
        if (d.state == State.Challenged) {
            if (block.timestamp < d.drawUntil) revert TooEarly(id, d.drawUntil);
            _drawEnded(d.model);
            return _end(id, d, Outcome.NotDrawn, 0, 0, 0, d.bond);
        }
        if (d.state != State.Drawn) revert WrongState(id, d.state);
        if (_overdue(d)) return _withheld(id, d);
        if (!_counted(d)) revert TooEarly(id, d.reveals == d.commits ? d.commitUntil : d.revealUntil);
        _tally(id, d);
    }

    // ------------------------------------------------------------------ views

    /// @notice What a member commits to: bound to the dispute and to itself, so that nobody can copy it.
    function commitmentOf(bytes32 id, address member, uint64 number, bytes32 salt) public pure returns (bytes32) {
        return keccak256(abi.encode(id, member, number, salt));
    }

    // ------------------------------------------------------------------ private: the panel

    /// Nobody of these, and nobody that they own or are owned by, may judge. An address that never registered has no owner: zero bars nobody.
    function _parties(Dispute storage d) private view returns (address[8] memory barred) {
        (barred[0], barred[1], barred[2], barred[3]) = (d.client, d.provider, d.scheduler, d.challenger);
        for (uint256 i = 0; i < 4; ++i) {
            (barred[4 + i],) = registry.identity(barred[i]);
        }
    }

    function _seatPanel(bytes32 id, Dispute storage d, address[5] memory panel) private {
        for (uint256 i = 0; i < PANEL_SIZE; ++i) {
            d.members[i].operator = panel[i];
            ++_seats[panel[i]].panels;
        }
        d.state = State.Drawn;
        d.reportUntil = uint40(block.timestamp) + _reportSeconds;
        d.postUntil = d.reportUntil + _postSeconds;
        d.commitUntil = d.postUntil + _commitSeconds;
        d.revealUntil = d.commitUntil + _revealSeconds;
        emit PanelDrawn(id, panel, d.reportUntil, d.postUntil, d.commitUntil);
    }

    function _seatOf(bytes32 id, Dispute storage d) private view returns (uint256 place) {
        while (place < PANEL_SIZE && d.members[place].operator != msg.sender) ++place;
        if (place == PANEL_SIZE) revert NotMember(id, msg.sender);
    }

    function _overdue(Dispute storage d) private view returns (bool) {
        return d.missing != 0 && !d.posted && block.timestamp >= d.postUntil;
    }

    /// Nobody can reveal any more, or everybody who could has.
    function _counted(Dispute storage d) private view returns (bool) {
        if (block.timestamp < d.commitUntil) return false;
        return block.timestamp >= d.revealUntil || d.reveals == d.commits;
    }

    // ------------------------------------------------------------------ private: the verdict

    /// Everyone on the panel is paid for being there; nobody gains from reporting: the rest of the bond burns.
    function _withheld(bytes32 id, Dispute storage d) private {
        for (uint256 i = 0; i < PANEL_SIZE; ++i) {
            address operator = d.members[i].operator;
            --_seats[operator].panels;
            _credit(operator, id, _panelFee);
        }
        _end(id, d, Outcome.Withheld, 0, 0, 0, d.bond - PANEL_SIZE * _panelFee);
    }

    function _tally(bytes32 id, Dispute storage d) private {
        (uint8 beyond, uint8 within, uint256 pot) = _count(d);
        Split memory s;
        Outcome outcome = Outcome.Inconclusive;
        uint256 winners = d.reveals;
        if (beyond >= SLASH_QUORUM && d.slashable) {
            (outcome, winners) = (Outcome.Slashed, beyond);
            s = Payouts.slash(terms(), d.locked, d.amount, beyond);
        } else if (beyond >= MAJORITY) {
            (outcome, winners) = (Outcome.Restitution, beyond);
            s = Payouts.restore(terms(), d.locked, d.amount, beyond);
        } else if (within >= MAJORITY) {
            (outcome, winners) = (Outcome.Dismissed, within);
            pot += d.bond;
        }
        if (winners != 0) s.each += pot / winners;
        s.burned += winners == 0 ? pot : pot % winners;
        if (s.each != 0) _payPanel(id, d, outcome, s.each);
        if (s.victim != 0) _credit(d.client, id, s.victim);
        if (outcome != Outcome.Dismissed) s.challenger += d.bond;
        if (s.challenger != 0) _credit(d.challenger, id, s.challenger);
        _end(id, d, outcome, beyond, within, s.taken, s.burned);
    }

    /// Counts the sides, frees the seats, and collects what the silent owe.
    function _count(Dispute storage d) private returns (uint8 beyond, uint8 within, uint256 pot) {
        for (uint256 i = 0; i < PANEL_SIZE; ++i) {
            Member memory member = d.members[i];
            --_seats[member.operator].panels;
            if (member.status != Status.Revealed) pot += _takeNoShowFee(member.operator);
            else if (member.number > d.bound) ++beyond;
            else ++within;
        }
    }

    /// Only the winning side is paid; where there is none, all that revealed.
    function _payPanel(bytes32 id, Dispute storage d, Outcome outcome, uint256 each) private {
        for (uint256 i = 0; i < PANEL_SIZE; ++i) {
            Member memory member = d.members[i];
            if (member.status != Status.Revealed) continue;
            bool beyond = member.number > d.bound;
            if (outcome == Outcome.Inconclusive || beyond == (outcome != Outcome.Dismissed)) {
                _credit(member.operator, id, each);
            }
        }
    }

    /// Takes from the provider's lock what the verdict takes, and unlocks the rest.
    function _end(
        bytes32 id,
        Dispute storage d,
        Outcome outcome,
        uint8 beyond,
        uint8 within,
        uint256 taken,
        uint256 burned
    ) private {
        (d.state, d.outcome) = (State.Finished, outcome);
        toBurn += burned;
        (address provider, uint96 rest) = (d.provider, d.locked - uint96(taken));
        emit Finished(id, outcome, beyond, within, uint96(taken), burned);
        if (taken != 0) registry.slash(provider, uint96(taken), address(this));
        if (rest != 0) registry.unlock(provider, rest);
    }
}
