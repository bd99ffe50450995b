// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IStakeRegistry} from "./IStakeRegistry.sol";

/// @notice Every amount, share and duration of disputes, fixed at deployment. PROPERTIES.md gives the reason of each default.
struct Terms {
    uint96 seatStake; // base units that one verifier locks; every seat weighs the same, so the draw is by stake
    uint96 noShowFee; // base units that a drawn member pays for revealing nothing
    uint96 panelFee; // base units that each member on the winning side earns at least
    uint96 bondMinimum; // base units; pays a whole panel
    uint96 lockMinimum; // base units of the provider's stake below which a dispute is not worth a panel
    uint32 bondPpm; // the bond's first part: this share of what is locked of the provider's stake
    uint32 amountBondPpm; // and its second: this share of the amount in dispute
    uint32 burnPpm; // share of whatever leaves a provider's stake that nobody gets; at least a half
    uint32 challengerPpm; // challenger's share of what is left of a slash after fees and victim; the panel has the rest
    uint32 slashMultiple; // a slash is this many times the amount in dispute
    uint32 victimMultiple; // a victim gets at most this many times the amount
    uint32 slashVerifiersMin; // seasoned verifiers of a model below which it has restitution only
    uint32 drawDelayBlocks; // blocks between the challenge and the block whose hash draws the panel
    uint32 drawSeconds; // to draw, from the challenge
    uint32 reportSeconds; // to report evidence missing, from the draw
    uint32 postSeconds; // to post evidence that was reported missing
    uint32 commitSeconds; // to commit, after that
    uint32 revealSeconds; // to reveal, after that
    uint32 challengeSeconds; // to challenge, from the lease's issue
    uint32 epochSeconds; // a verifier's seniority is counted in epochs
    uint32 seasoningEpochs; // whole epochs between a verifier's enrolment and the lease
}

/// @title The terms of a deployment of Disputes, as immutables, checked once
abstract contract DisputeTerms {
    /// @notice Members of a panel, and the majorities that slash and that restore (or dismiss).
    uint256 public constant PANEL_SIZE = 5;
    uint256 public constant SLASH_QUORUM = 4;
    uint256 public constant MAJORITY = 3;

    /// @notice Epochs that counting seasoned verifiers may visit, so that its gas is bounded.
    uint256 public constant EPOCHS_MAX = 96;

    uint256 internal constant PPM = 1_000_000;

    uint96 internal immutable _seatStake;
    uint96 internal immutable _noShowFee;
    uint96 internal immutable _panelFee;
    uint96 internal immutable _bondMinimum;
    uint96 internal immutable _lockMinimum;
    uint32 internal immutable _bondPpm;
    uint32 internal immutable _amountBondPpm;
    uint32 internal immutable _burnPpm;
    uint32 internal immutable _challengerPpm;
    uint32 internal immutable _slashMultiple;
    uint32 internal immutable _victimMultiple;
    uint32 internal immutable _slashVerifiersMin;
    uint32 internal immutable _drawDelayBlocks;
    uint32 internal immutable _drawSeconds;
    uint32 internal immutable _reportSeconds;
    uint32 internal immutable _postSeconds;
    uint32 internal immutable _commitSeconds;
    uint32 internal immutable _revealSeconds;
    uint32 internal immutable _challengeSeconds;
    uint32 internal immutable _epochSeconds;
    uint32 internal immutable _seasoningEpochs;

    /// @notice A term, or the relation of several, is refused; `which` names it in ASCII.
    error InvalidTerms(bytes32 which);

    constructor(IStakeRegistry registry_, Terms memory t) {
        _checkMoney(t);
        _checkTimes(registry_, t);
        (_seatStake, _noShowFee, _panelFee) = (t.seatStake, t.noShowFee, t.panelFee);
        (_bondMinimum, _lockMinimum, _bondPpm) = (t.bondMinimum, t.lockMinimum, t.bondPpm);
        (_amountBondPpm, _burnPpm, _challengerPpm) = (t.amountBondPpm, t.burnPpm, t.challengerPpm);
        (_slashMultiple, _victimMultiple, _slashVerifiersMin) =
            (t.slashMultiple, t.victimMultiple, t.slashVerifiersMin);
        (_drawDelayBlocks, _drawSeconds, _reportSeconds) = (t.drawDelayBlocks, t.drawSeconds, t.reportSeconds);
        (_postSeconds, _commitSeconds, _revealSeconds) = (t.postSeconds, t.commitSeconds, t.revealSeconds);
        (_challengeSeconds, _epochSeconds, _seasoningEpochs) = (t.challengeSeconds, t.epochSeconds, t.seasoningEpochs);
    }

    /// @notice The terms of this deployment.
    function terms() public view returns (Terms memory t) {
        (t.seatStake, t.noShowFee, t.panelFee) = (_seatStake, _noShowFee, _panelFee);
        (t.bondMinimum, t.lockMinimum, t.bondPpm) = (_bondMinimum, _lockMinimum, _bondPpm);
        (t.amountBondPpm, t.burnPpm, t.challengerPpm) = (_amountBondPpm, _burnPpm, _challengerPpm);
        (t.slashMultiple, t.victimMultiple, t.slashVerifiersMin) =
            (_slashMultiple, _victimMultiple, _slashVerifiersMin);
        (t.drawDelayBlocks, t.drawSeconds, t.reportSeconds) = (_drawDelayBlocks, _drawSeconds, _reportSeconds);
        (t.postSeconds, t.commitSeconds, t.revealSeconds) = (_postSeconds, _commitSeconds, _revealSeconds);
        (t.challengeSeconds, t.epochSeconds, t.seasoningEpochs) = (_challengeSeconds, _epochSeconds, _seasoningEpochs);
    }

    /// Half of what leaves a stake burns, whoever shares the rest; a lost bond pays every member, and so does the smallest slash.
    function _checkMoney(Terms memory t) private pure {
        if (t.burnPpm < PPM / 2 || t.burnPpm > PPM * 9 / 10) revert InvalidTerms("burnPpm");
        if (t.challengerPpm > PPM) revert InvalidTerms("challengerPpm");
        if (t.bondPpm > PPM) revert InvalidTerms("bondPpm");
        if (t.amountBondPpm > PPM) revert InvalidTerms("amountBondPpm");
        if (t.panelFee == 0) revert InvalidTerms("panelFee");
        if (t.noShowFee < t.panelFee) revert InvalidTerms("noShowFee");
        if (t.seatStake < t.noShowFee) revert InvalidTerms("seatStake");
        if (t.bondMinimum < PANEL_SIZE * t.panelFee) revert InvalidTerms("bondMinimum");
        if (t.lockMinimum * (PPM - t.burnPpm) < PPM * PANEL_SIZE * t.panelFee) revert InvalidTerms("lockMinimum");
        if (t.victimMultiple == 0) revert InvalidTerms("victimMultiple");
        if (t.slashMultiple < t.victimMultiple) revert InvalidTerms("slashMultiple");
        if (t.slashVerifiersMin < PANEL_SIZE) revert InvalidTerms("slashVerifiersMin");
    }

    /// Stake that stood behind a lease when it was issued is still there when the last dispute about it ends.
    function _checkTimes(IStakeRegistry registry_, Terms memory t) private view {
        if (t.drawDelayBlocks == 0 || t.drawDelayBlocks > 128) revert InvalidTerms("drawDelayBlocks");
        if (t.drawSeconds == 0) revert InvalidTerms("drawSeconds");
        if (t.reportSeconds == 0) revert InvalidTerms("reportSeconds");
        if (t.postSeconds == 0) revert InvalidTerms("postSeconds");
        if (t.commitSeconds == 0) revert InvalidTerms("commitSeconds");
        if (t.revealSeconds == 0) revert InvalidTerms("revealSeconds");
        if (t.challengeSeconds == 0) revert InvalidTerms("challengeSeconds");
        if (t.epochSeconds == 0) revert InvalidTerms("epochSeconds");
        uint256 epochs = uint256(t.challengeSeconds) / t.epochSeconds + t.seasoningEpochs + 2;
        if (t.seasoningEpochs == 0 || epochs > EPOCHS_MAX) revert InvalidTerms("seasoningEpochs");
        uint256 longest = uint256(t.drawSeconds) + t.reportSeconds + t.postSeconds + t.commitSeconds + t.revealSeconds;
        if (longest + t.challengeSeconds >= registry_.unbondingDelay()) revert InvalidTerms("unbondingDelay");
    }
}
