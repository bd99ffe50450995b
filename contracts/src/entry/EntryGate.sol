// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";

/// @title EntryGate: how tokens come in, and what a launch may refuse
/// @notice A young contract should not hold more than its makers dare to lose. Both means only ever refuse tokens that would come in:
/// - limits, fixed at deployment, on what one position and on what the whole contract may hold;
/// - a guardian, fixed at deployment, that may pause entry and lift the pause. Zero: nobody can.
///
/// What must never happen: a path by which tokens leave asks this contract anything. Nothing here is read by an exit.
abstract contract EntryGate {
    using SafeERC20 for IERC20;

    /// @notice The ERC-20 that comes in.
    IERC20 public immutable token;

    /// @notice The only address that may pause entry; zero: nobody. It can do nothing else, and nobody can replace it.
    address public immutable guardian;

    /// @notice The most base units that one position (a channel, a node) may hold; the largest uint96: no limit.
    uint96 public immutable positionMax;

    /// @notice The most base units of the token that this contract may hold after a deposit; the largest uint256: no limit.
    /// @dev Measured by the balance, so that no exit has to keep a count. Whoever sends tokens here to fill the limit loses them.
    uint256 public immutable totalMax;

    /// @notice Whether entry is paused.
    bool public entryPaused;

    /// @notice `paused` is the new value.
    event EntryPaused(bool paused);

    /// @notice The token address holds no code.
    error InvalidToken(address token);
    /// @notice The guardian has paused entry: no tokens come in until it lifts the pause; every way out stays open.
    error EntryIsPaused();
    /// @notice The caller is not the guardian.
    error NotGuardian(address caller);
    /// @notice The channel or node would hold more than one may at launch.
    error AbovePositionMax(uint256 held, uint96 positionMax);
    /// @notice The contract would hold more than it may at launch.
    error AboveTotalMax(uint256 held, uint256 totalMax);
    /// @notice The token delivered another amount than was asked (fee on transfer): such tokens cannot be held here.
    error UnexpectedDeposit(uint256 expected, uint256 received);

    modifier whileEntryIsOpen() {
        if (entryPaused) revert EntryIsPaused();
        _;
    }

    /// @param token_ The ERC-20 that comes in: exact transfers only, no rebasing.
    /// @param guardian_ Who may pause entry; zero for nobody.
    /// @param positionMax_ The most that one position may hold, base units; zero for no limit.
    /// @param totalMax_ The most that this contract may hold, base units; zero for no limit.
    constructor(IERC20 token_, address guardian_, uint96 positionMax_, uint256 totalMax_) {
        if (address(token_).code.length == 0) revert InvalidToken(address(token_));
        token = token_;
        guardian = guardian_;
        positionMax = positionMax_ == 0 ? type(uint96).max : positionMax_;
        totalMax = totalMax_ == 0 ? type(uint256).max : totalMax_;
    }

    /// @notice The guardian stops or resumes entry. What is inside can leave as before.
    function pauseEntry(bool paused) external {
        if (msg.sender != guardian || guardian == address(0)) revert NotGuardian(msg.sender);
        entryPaused = paused;
        emit EntryPaused(paused);
    }

    /// Takes `amount` from the caller for a position that will hold `held` in all.
    function _takeIn(uint96 amount, uint256 held) internal {
        if (held > positionMax) revert AbovePositionMax(held, positionMax);
        uint256 before = token.balanceOf(address(this));
        token.safeTransferFrom(msg.sender, address(this), amount);
        uint256 total = token.balanceOf(address(this));
        if (total - before != amount) revert UnexpectedDeposit(amount, total - before);
        if (total > totalMax) revert AboveTotalMax(total, totalMax);
    }
}
